"""The recipe of a whole Hugging Face model, one graph."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save

from loraexport_runtime.adapters.dora import SCALES_FILE
from loraexport_runtime.checking.model import load_reference
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import Manifest

from ..bases.model import ModelModules, load_model_base
from ..bases.weights import Base
from ..export.onnx import export_model_onnx
from ..export.torchscript import export_model_torchscript
from ..parity.implementations import NO_BASE
from ..parity.model.check import check_model
from ..parity.model.plain_model import PlainModel
from ..parity.model.reference import make_reference, save_reference
from ..parity.oracle import read_adapters
from ..parity.report import Report
from ..plan.model import ModelPlan
from ..plan.plan import Plan
from .files import copy_tokenizer
from .manifest import make_manifest
from .progress import Progress
from .subject import Subject


@dataclass(frozen=True)
class LoadedModel:
    """The model's weights, and its eager module with the adapters in it."""

    plan: Plan[ModelPlan]
    base: Base
    modules: ModelModules


def load(plan: Plan[ModelPlan]) -> LoadedModel:
    """See Recipe."""
    return LoadedModel(plan, *load_model_base(plan))


def export(loaded: LoadedModel, folder: Path, progress: Progress) -> Manifest:
    """See Recipe."""
    plan, modules = loaded.plan, loaded.modules
    model = _describe(plan)
    manifest = make_manifest(plan, loaded.base, model)
    copy_tokenizer(plan.kind.directory, folder, model, progress)
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
    return manifest


def prove(subject: Subject[Model], loaded: LoadedModel | None) -> Report:
    """See Recipe."""
    folder, manifest, model = subject.folder, subject.manifest, subject.kind
    plain: tuple[ModelModules, Path] | str
    if loaded is None:
        reference, plain = load_reference(folder, manifest, model), NO_BASE
    else:
        directory, adapters = loaded.plan.kind.directory, read_adapters(folder, manifest)
        oracle = PlainModel(directory, manifest, model, adapters)
        reference = make_reference(oracle, manifest, model, subject.spec.parity.seed)
        plain = loaded.modules, directory
    if subject.keep_cases:
        save_reference(reference, folder)
    return check_model(folder, manifest, model, subject.spec, reference, plain, subject.providers)


def _describe(plan: Plan[ModelPlan]) -> Model:
    planned, formats = plan.kind, plan.spec.formats
    return Model(
        planned.task,
        planned.blend,
        planned.packed,
        planned.inputs,
        planned.outputs,
        onnx="graphs/model.onnx" if "onnx" in formats else None,
        torchscript="graphs/model.ts" if "torchscript" in formats else None,
        facts=planned.facts,
    )
