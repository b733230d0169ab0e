"""The recipe of a whole Hugging Face model, one graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save

from loraexport_runtime.checking.model import ModelReference, load_reference
from loraexport_runtime.contract.kinds import Kind, Model
from loraexport_runtime.contract.manifest import Function, Manifest

from ..bases.model import ModelModules, load_model_base
from ..bases.weights import Base
from ..errors import ExportError
from ..export.onnx import export_model_onnx
from ..export.torchscript import export_model_torchscript
from ..hf.sentences.tail import Tail
from ..parity.implementations import NO_BASE
from ..parity.model.check import check_model
from ..parity.model.plain_model import PlainModel
from ..parity.model.reference import make_reference, save_reference
from ..parity.oracle import read_adapters
from ..parity.report import Report
from ..plan.model import ModelPlan
from ..plan.plan import Plan
from .files import copy_tokenizer, write_scales
from .manifest import make_manifest, marked
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
    layers = [planned.layer for planned in plan.layers]
    found: dict[str, Function] = {}
    lower_case = plan.kind.tail is not None and plan.kind.tail.lower_case
    copy_tokenizer(plan.kind.directory, folder, model, progress, lower_case)
    failed: dict[str, ExportError] = {}
    if model.torchscript:
        progress("export the model to TorchScript")
        try:
            export_model_torchscript(modules, plan.spec.name, folder / model.torchscript)
        except ExportError as error:
            failed["torchscript"] = error
    if model.onnx:
        progress(f"export the model to ONNX ({layers[0].strategy})")
        slots = plan.num_slots if plan.spec.export.kernels else None
        try:
            found = export_model_onnx(modules, plan.spec.name, folder / model.onnx, slots)
        except ExportError as error:
            failed["onnx"] = error
    _raise_failed(failed, plan.spec.formats)
    for path in {layer.base_rows for layer in layers if layer.base_rows}:
        (folder / path).write_bytes(save(modules.base_rows))
    write_scales(folder, modules.output_scales)
    return make_manifest(plan, loaded.base, model, marked(plan, layers, found, progress))


def _raise_failed(failed: Mapping[str, ExportError], formats: Sequence[str]) -> None:
    """Raise what failed, and say which format did not."""
    if not failed:
        return
    said = "; ".join(map(str, failed.values()))
    exported = [name for name in formats if name not in failed]
    if exported:
        said += f". As {exported[0]} it can be made: set export: {{formats: [{exported[0]}]}}"
    raise ExportError(said) from next(iter(failed.values()))


def prove(subject: Subject[Model], loaded: LoadedModel | None) -> Report:
    """See Recipe."""
    folder, manifest, model = subject.folder, subject.manifest, subject.kind
    plain: tuple[ModelModules, Path, Tail | None] | str
    if loaded is None:
        reference, plain = load_reference(folder, manifest, model), NO_BASE
    else:
        directory, tail = loaded.plan.kind.directory, loaded.plan.kind.tail
        adapters = read_adapters(folder, manifest)
        oracle = PlainModel(directory, manifest, model, adapters, tail=tail)
        reference = make_reference(oracle, manifest, model, subject.spec.parity.seed)
        plain = loaded.modules, directory, tail
    return compare(subject, model, reference, plain)


def compare(
    subject: Subject[Kind],
    model: Model,
    reference: ModelReference,
    plain: tuple[ModelModules, Path, Tail | None] | str,
) -> Report:
    """Keep the cases where that is asked for, and run every implementation on them."""
    if subject.keep_cases:
        save_reference(reference, subject.folder)
    return check_model(
        subject.folder,
        subject.manifest,
        model,
        subject.spec,
        reference,
        plain,
        subject.providers,
        subject.torchscript,
    )


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
