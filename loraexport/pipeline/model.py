"""A whole Hugging Face model: read, exported, proven."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import save

from loraexport_runtime.adapters.dora import SCALES_FILE
from loraexport_runtime.contract.manifest import Manifest

from ..parity.report import Report
from ..plan.plan import Plan

if TYPE_CHECKING:  # it imports torch
    pass
from ..parity.model.plain_model import PlainModel
from ..parity.oracle import read_adapters
from .files import copy_tokenizer
from .manifest import make_manifest
from .progress import Progress


def _prove_model(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, export and verify a whole model, one graph."""
    from ..bases.model import load_model
    from ..export.onnx import export_model_onnx
    from ..export.torchscript import export_model_torchscript
    from ..parity import implementations as proof
    from ..parity.model import check as verify_model
    from ..parity.model import reference as model_reference

    progress("read weights")
    assert plan.model is not None, "the plan is of a whole model"
    directory, seed = plan.model.directory, plan.spec.parity.seed
    base, modules = load_model(plan)
    manifest = make_manifest(plan, base)
    model = manifest.model
    assert model is not None, "the manifest has what the plan has"
    copy_tokenizer(directory, folder, model, progress)
    if model.torchscript:
        progress("export the model to TorchScript")
        export_model_torchscript(modules, plan.spec.name, folder / model.torchscript)
    if model.onnx:
        progress(f"export the model to ONNX ({manifest.layers[0].strategy})")
        export_model_onnx(modules, plan.spec.name, folder / model.onnx)
    for path in {layer.base_rows for layer in manifest.layers if layer.base_rows}:
        (folder / path).write_bytes(save(modules.base_rows))
    for name, scales in modules.output_scales.items():
        if scales:
            (folder / "adapters" / name / SCALES_FILE).write_bytes(save(scales))
    progress("verify")
    adapters = read_adapters(folder, manifest)
    plain = PlainModel(directory, manifest, model, adapters)
    reference = model_reference.make_reference(plain, manifest, model, seed)
    model_reference.save_reference(reference, folder)
    providers = proof.default_providers(manifest)
    report = verify_model.check_model(
        folder, manifest, model, plan.spec, reference, (modules, directory), providers
    )
    return manifest, report
