"""A whole model's graphs -> Report: every implementation against a float64 model, and PEFT.

The reference is the plain Hugging Face model in float64 with `W + scaling B A` merged in, one
adapter at a time, by the oracle's own reading of the adapters. Padding is not compared.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save

from loraexport_runtime import ModelSession
from loraexport_runtime.devices import CPU, NUMPY_DTYPES, normalise_providers
from loraexport_runtime.manifest import Manifest, Model, TensorEntry, resolve

from .bases.pooling import SentencePooling
from .bases.transformers import ModelModules, has_rotary_positions, load_plain_model, take_output
from .errors import BaseModelError
from .lora.reference import ReferenceAdapter, read_reference_adapter
from .proof import (
    CASES_FILE,
    make_report,
    open_plain_onnx,
    open_torchscript,
    slot_names,
    tolerance_of,
    torch_devices,
)
from .quiet import quiet_models
from .report import Report, Row, Tolerance, compare
from .spec import Spec
from .tensors import to_numpy, to_torch

TOLERANCES = {
    # A dozen layers add up what one layer rounds (see report.TOLERANCES), and gain is not linear.
    "float32": Tolerance(error=1e-4, gain=1e-3, epsilon=2.0**-24),
    "float16": Tolerance(error=2e-2, gain=3e-2, epsilon=2.0**-11),
    "bfloat16": Tolerance(error=1e-1, gain=1e-1, epsilon=2.0**-8),
}
Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs, np.ndarray], np.ndarray]
"""(inputs by name, adapter_ids int64 [batch]) -> the model's output."""


@dataclass(frozen=True)
class RowCase:
    """A batch: the slot of each row; of texts also the lengths, padded on one side."""

    name: str
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    left: bool = False


@dataclass(frozen=True)
class ModelReference:
    """Inputs, mask-aware expected outputs, and what the base alone gives, by case."""

    source: str
    inputs: dict[str, Inputs]
    expected: dict[str, np.ndarray]
    base_expected: dict[str, np.ndarray]


def make_cases(names: Mapping[int, str], entries: Sequence[TensorEntry]) -> tuple[RowCase, ...]:
    """Every adapter alone, all mixed (texts with either padding), base only, one row."""
    slots = sorted(names)
    mixed = (*slots, 0, slots[0])
    lengths = tuple(3 + 4 * (index % 4) for index in range(len(mixed)))
    cases = (
        *(RowCase(f"alone-{names[slot]}", (slot, slot), (6, 10)) for slot in slots),
        RowCase("mixed", mixed, lengths),
        RowCase("mixed-left", mixed[::-1], lengths, left=True),
        RowCase("base-only", (0, 0), (5, 8)),
        RowCase("one-row", (slots[-1],), (9,)),
    )
    texts = any("sequence" in entry.shape for entry in entries)
    return tuple(case for case in cases if texts or not case.left)


def make_inputs(
    case: RowCase, entries: Sequence[TensorEntry], vocabulary: int, seed: int, pad: int = 0
) -> Inputs:
    """Random ids other than `pad`, and the masks that the lengths and the padding's side ask for.

    Images are standard normal, one per row; lengths mean nothing to them.
    Some models (RoBERTa) find positions, others (Llama, to classify) the last token, by `pad`.
    """
    generator = np.random.default_rng([seed, len(case.slots), *case.lengths, int(case.left)])
    shape = (len(case.slots), max(case.lengths))
    for entry in entries:
        if entry.name == "pixel_values":
            pixels = generator.standard_normal(entry.sizes(*shape))
            return {entry.name: pixels.astype(NUMPY_DTYPES[entry.dtype])}
    mask = np.zeros(shape, np.int64)
    for row, length in enumerate(case.lengths):
        mask[row, -length if case.left else 0 : None if case.left else length] = 1
    ids = generator.integers(0, vocabulary - 1, shape)
    values = {
        "input_ids": np.where(mask == 1, ids + (ids >= pad), pad),
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
    }
    return {entry.name: values[entry.name] for entry in entries}


def make_reference(
    folder: Path, directory: Path, manifest: Manifest, model: Model, spec: Spec
) -> ModelReference:
    """Run the float64 model, once for each adapter of each case."""
    plain = _Plain(directory, model.task)
    config = plain.model.config
    # A model of images has neither.
    vocabulary, pad = getattr(config, "vocab_size", 0), getattr(config, "pad_token_id", 0) or 0
    sites = [layer.slices[0].site for layer in manifest.layers]
    adapters = {
        entry.slot: read_reference_adapter(resolve(folder, entry.path), sites, entry.scale)
        for entry in manifest.adapters
        if entry.slot is not None
    }
    inputs, expected, base_expected = {}, {}, {}
    for case in make_cases(slot_names(manifest), model.inputs):
        values = make_inputs(case, model.inputs, vocabulary, spec.parity.seed, pad)
        base = plain(values)
        _require_finite(base, values, case, plain, model)
        merged = base.copy()
        for slot in set(case.slots) - {0}:
            rows = np.array(case.slots) == slot
            with plain.merged(adapters[slot]):
                merged[rows] = plain(values)[rows]
        inputs[case.name], base_expected[case.name] = values, base
        expected[case.name] = merged
    return ModelReference("the float64 model, merged", inputs, expected, base_expected)


def _require_finite(
    y: np.ndarray, inputs: Inputs, case: RowCase, plain: "_Plain", model: Model
) -> None:
    keep: Any = inputs["attention_mask"] == 1 if "sequence" in model.outputs[0].shape else ...
    if not np.isfinite(y[keep]).all():
        what = "padded texts" if "attention_mask" in inputs else "images"
        raise BaseModelError(
            f"a model of type {plain.model.config.model_type!r} gives NaN or Inf for {what},"
            f" in float64 and without adapters (case {case.name!r}), so there is nothing to compare"
            " its graphs with"
        )


def save_reference(reference: ModelReference, folder: Path) -> None:
    """Keep inputs and expected outputs (as float32) in the artifact."""
    arrays: dict[str, np.ndarray] = {}
    for case, inputs in reference.inputs.items():
        arrays |= {f"{case}/x/{name}": value for name, value in inputs.items()}
        arrays[f"{case}/y"] = reference.expected[case].astype(np.float32)
        arrays[f"{case}/base"] = reference.base_expected[case].astype(np.float32)
    (folder / CASES_FILE).parent.mkdir(exist_ok=True)
    (folder / CASES_FILE).write_bytes(save(arrays))


def load_reference(folder: Path) -> ModelReference:
    """The reference that a build kept."""
    arrays = load_file(resolve(folder, CASES_FILE))
    names = dict.fromkeys(name.split("/")[0] for name in arrays)
    inputs = {
        case: {
            name.split("/")[2]: array
            for name, array in arrays.items()
            if name.startswith(f"{case}/x/")
        }
        for case in names
    }
    expected = {case: arrays[f"{case}/y"] for case in names}
    base = {case: arrays[f"{case}/base"] for case in names}
    return ModelReference("the stored cases", inputs, expected, base)


def check_model(
    folder: Path,
    manifest: Manifest,
    model: Model,
    spec: Spec,
    reference: ModelReference,
    modules: ModelModules | None,
    directory: Path | None,
    providers: Sequence[str],
) -> Report:
    """Run every implementation on every case and compare.

    Args:
        modules, directory: the eager model and the base's directory; None where it is not at hand.
    """
    tolerance = tolerance_of(spec, TOLERANCES)
    skipped: dict[str, str] = {}
    rows: list[Row] = []
    every = _implementations(folder, manifest, model, modules, directory, providers, skipped)
    for name, run in every:
        rows += _compare(name, run, manifest, model, reference, tolerance)
    has_onnx = model.onnx is not None
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx)


class _Plain:
    """The Hugging Face model in float64, into which one adapter at a time can be merged."""

    def __init__(self, directory: Path, task: str, dtype: torch.dtype = torch.float64) -> None:
        self.model: Any = load_plain_model(directory, task).to(dtype)
        self._dtype = dtype
        self.pooling = SentencePooling.read(directory) if task == "sentence-embedding" else None

    def __call__(self, inputs: Inputs, **arguments: Any) -> np.ndarray:
        tensors = {name: to_torch(value) for name, value in inputs.items()}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"].to(self._dtype)
        if "input_ids" in tensors and has_rotary_positions(self.model.config):
            batch, sequence = tensors["input_ids"].shape
            tensors["position_ids"] = torch.arange(sequence).expand(batch, -1)
        with torch.no_grad():
            y = take_output(self.model(**tensors, **arguments, return_dict=True))
            if self.pooling is not None:
                y = self.pooling(y, tensors["attention_mask"])
        return to_numpy(y)

    def merged(self, adapter: ReferenceAdapter) -> "_Merged":
        return _Merged(self.model, adapter)


class _Merged:
    """W + scaling B A in every site, undone at the end."""

    def __init__(self, model: Any, adapter: ReferenceAdapter) -> None:
        self._model = model
        self._adapter = adapter
        self._kept: dict[str, torch.nn.Parameter] = {}

    def __enter__(self) -> None:
        for site, (a, b, scaling) in self._adapter.sites.items():
            module = self._model.get_submodule(site)
            weight = self._kept[site] = module.weight
            delta = torch.from_numpy(scaling * (b @ a)).to(weight.dtype)
            # A Conv1D stores [in, out].
            transposed = type(module).__name__ == "Conv1D"
            # A parameter of its own: an embedding may be tied to this one, and stays as it is.
            merged = weight.detach() + (delta.T if transposed else delta)
            module.weight = torch.nn.Parameter(merged, requires_grad=False)

    def __exit__(self, *_: object) -> None:
        for site, weight in self._kept.items():
            self._model.get_submodule(site).weight = weight


def _compare(
    name: str,
    run: Run,
    manifest: Manifest,
    model: Model,
    reference: ModelReference,
    tolerance: Tolerance,
) -> list[Row]:
    names = slot_names(manifest)
    output = model.outputs[0]
    parts: dict[int, list[list[np.ndarray]]] = {slot: [] for slot in (0, *sorted(names))}
    for case in make_cases(names, model.inputs):
        inputs = reference.inputs[case.name]
        adapter_ids = np.array(case.slots, dtype=np.int64)
        found = run(inputs, adapter_ids)
        base_found = run(inputs, np.zeros_like(adapter_ids))
        for slot in set(case.slots):
            keep: Any = adapter_ids == slot
            if "sequence" in output.shape:
                keep = keep[:, None] & (inputs["attention_mask"] == 1)
            expected, base = reference.expected[case.name], reference.base_expected[case.name]
            parts[slot].append([one[keep] for one in (found, expected, base_found, base)])
    rows = []
    for slot, pieces in parts.items():
        y, ref, y_base, ref_base = (np.concatenate(one) for one in zip(*pieces, strict=True))
        labels = (name, model.task, output.name, names.get(slot, "base"))
        rows.append(compare(labels, y, ref, y_base, ref_base, tolerance))
    return rows


def _implementations(
    folder: Path,
    manifest: Manifest,
    model: Model,
    modules: ModelModules | None,
    directory: Path | None,
    providers: Sequence[str],
    skipped: dict[str, str],
) -> Iterator[tuple[str, Run]]:
    names = [name for name, _ in normalise_providers(providers)] if providers else []
    if modules is not None:
        yield "eager", _eager_runner(modules)
    else:
        skipped["eager"] = "the base is not here"
    if directory is None:
        skipped["peft"] = "the base is not here"
    elif importlib.util.find_spec("peft") is None:
        skipped["peft"] = "peft is not installed"
    else:
        yield "peft", _peft_runner(folder, manifest, model, directory)
    if model.torchscript is not None:
        path = resolve(folder, model.torchscript)
        for device in torch_devices(names):
            yield f"torchscript-{device}", _torchscript_runner(path, model, device)
    else:
        skipped["torchscript"] = "the spec does not ask for it"
    if model.onnx is None:
        skipped["onnx"] = "the spec does not ask for it"
        return
    if not names:
        skipped["onnx"] = "onnxruntime's CPU provider has no bfloat16 MatMul, and no CUDA is here"
    for name in names:
        short = name.removesuffix("ExecutionProvider").lower()
        session = ModelSession(folder, manifest, model, normalise_providers([name]), None)
        yield f"onnx-{short}", _session_runner(session, slot_names(manifest))
        if name == CPU:
            yield "onnx-cpu-plain", _plain_runner(resolve(folder, model.onnx))


def _eager_runner(modules: ModelModules) -> Run:
    stacks = [to_torch(value) for value in modules.stacks.values()]

    def run(inputs: Inputs, adapter_ids: np.ndarray) -> np.ndarray:
        tensors = {name: to_torch(value) for name, value in inputs.items()}
        with torch.no_grad():
            return to_numpy(modules.module(tensors, torch.from_numpy(adapter_ids), stacks))

    return run


def _peft_runner(folder: Path, manifest: Manifest, model: Model, directory: Path) -> Run:
    """PEFT's own mixed batch, `adapter_names`, in float32."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    plain = _Plain(directory, model.task, torch.float32)
    wrapped: Any = None
    with quiet_models():
        for entry in manifest.adapters:
            path = str(resolve(folder, entry.path))
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(plain.model, path, adapter_name=entry.name)
            else:
                wrapped.load_adapter(path, adapter_name=entry.name)
    for entry in manifest.adapters:
        for module in wrapped.modules():
            if isinstance(module, LoraLayer) and entry.name in module.scaling:
                module.scaling[entry.name] *= entry.scale
    plain.model = wrapped.eval()
    names = {0: "__base__", **slot_names(manifest)}

    def run(inputs: Inputs, adapter_ids: np.ndarray) -> np.ndarray:
        return plain(inputs, adapter_names=[names[slot] for slot in adapter_ids.tolist()])

    return run


def _torchscript_runner(path: Path, model: Model, device: str) -> Run:
    graph = open_torchscript(path, device)

    def run(inputs: Inputs, adapter_ids: np.ndarray) -> np.ndarray:
        arrays = [*(inputs[entry.name] for entry in model.inputs), adapter_ids]
        with torch.no_grad():
            return to_numpy(graph(*(to_torch(array).to(device) for array in arrays)))

    return run


def _session_runner(session: ModelSession, names: Mapping[int, str]) -> Run:
    def run(inputs: Inputs, adapter_ids: np.ndarray) -> np.ndarray:
        adapters = [names.get(slot) for slot in adapter_ids.tolist()]
        y: np.ndarray = session.run(inputs, adapters)[session.model.outputs[0].name]
        return y

    return run


def _plain_runner(path: Path) -> Run:
    graph = open_plain_onnx(path)

    def run(inputs: Inputs, adapter_ids: np.ndarray) -> np.ndarray:
        y: np.ndarray = graph.run(None, {**inputs, "adapter_ids": adapter_ids})[0]
        return y

    return run
