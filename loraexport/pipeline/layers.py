"""The recipe of single layers, a graph each."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save

from loraexport_runtime.checking.layers import load_reference
from loraexport_runtime.contract.kinds import Layers
from loraexport_runtime.contract.manifest import Function, Manifest

from ..bases.adapters import load_adapters
from ..bases.layers import LayerModules, build_modules, load_layers_base
from ..bases.weights import Base
from ..export.onnx import export_onnx
from ..export.torchscript import export_torchscript
from ..parity.layers.check import check
from ..parity.layers.reference import make_reference, save_reference
from ..parity.report import Report
from ..plan.layers import LayersPlan
from ..plan.plan import Plan
from .manifest import make_manifest, marked
from .progress import Progress
from .subject import Subject


@dataclass(frozen=True)
class LoadedLayers:
    """The layers' weights, and their eager modules."""

    plan: Plan[LayersPlan]
    base: Base
    modules: tuple[LayerModules, ...]


def load(plan: Plan[LayersPlan]) -> LoadedLayers:
    """See Recipe."""
    base = load_layers_base(plan)
    return LoadedLayers(plan, base, build_modules(plan, base, load_adapters(plan, base)))


def export(loaded: LoadedLayers, folder: Path, progress: Progress) -> Manifest:
    """See Recipe."""
    plan, dtype = loaded.plan, loaded.plan.spec.export.dtype
    outlined_slots = plan.num_slots if plan.spec.export.kernels else None
    found: dict[str, Function] = {}
    for modules in loaded.modules:
        layer = modules.layer
        if layer.torchscript:
            progress(f"export {layer.name} to TorchScript")
            export_torchscript(layer, modules.segmented, dtype, folder / layer.torchscript)
        if layer.onnx:
            progress(f"export {layer.name} to ONNX ({layer.strategy})")
            found |= export_onnx(modules, dtype, folder / layer.onnx, outlined_slots)
        if layer.base_rows:
            (folder / layer.base_rows).write_bytes(save(modules.base_rows))
    layers = [modules.layer for modules in loaded.modules]
    return make_manifest(plan, loaded.base, Layers(), marked(plan, layers, found, progress))


def prove(subject: Subject[Layers], loaded: LoadedLayers | None) -> Report:
    """See Recipe."""
    folder, manifest, spec = subject.folder, subject.manifest, subject.spec
    modules: tuple[LayerModules, ...] = ()
    if loaded is None:
        reference = load_reference(folder, manifest)
    else:
        reference = make_reference(folder, manifest, spec, loaded.base)
        modules = loaded.modules
    if subject.keep_cases:
        save_reference(reference, folder)
    return check(folder, manifest, spec, reference, modules, subject.providers, subject.torchscript)
