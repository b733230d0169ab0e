"""Single layers: read, exported, proven."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import save

from loraexport_runtime.contract.manifest import Manifest

from ..parity.report import Report
from ..plan.plan import Plan

if TYPE_CHECKING:  # it imports torch
    pass
from ..parity.layers.reference import make_reference, save_reference
from .manifest import make_manifest
from .progress import Progress


def _prove_layers(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, export and verify single layers, a graph each."""
    from ..bases.adapters import load_adapters
    from ..bases.layers import build_modules, load_base
    from ..export.onnx import export_onnx
    from ..export.torchscript import export_torchscript
    from ..parity import implementations as proof
    from ..parity.layers import check as verify

    progress("read weights")
    dtype = plan.spec.export.dtype
    base = load_base(plan)
    modules = build_modules(plan, base, load_adapters(plan, base))
    for one in modules:
        layer = one.layer
        if layer.torchscript:
            progress(f"export {layer.name} to TorchScript")
            export_torchscript(layer, one.segmented, dtype, folder / layer.torchscript)
        if layer.onnx:
            progress(f"export {layer.name} to ONNX ({layer.strategy})")
            export_onnx(one, dtype, folder / layer.onnx)
        if layer.base_rows:
            (folder / layer.base_rows).write_bytes(save(one.base_rows))
    manifest = make_manifest(plan, base)
    progress("verify")
    reference = make_reference(folder, manifest, plan.spec, base)
    save_reference(reference, folder)
    providers = proof.default_providers(manifest)
    return manifest, verify.check(folder, manifest, plan.spec, reference, modules, providers)
