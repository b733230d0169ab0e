"""What a whole model should give: the plain Hugging Face model in float64, adapters merged in.

Of an ONNX graph there is no such model (see graph_reference).

At every site W' = W + sum_i w_i (W_i - W), W_i by the oracle's own reading of adapter i; a row of
one adapter has w = 1. So a blend is base + sum_i w_i (y_i - base) at each site.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import nn

from loraexport_runtime.adapters.packing import lowest
from loraexport_runtime.contract.manifest import Manifest, Model, TensorEntry, resolve
from loraexport_runtime.device.providers import NUMPY_DTYPES

from ...errors import BaseModelError
from ...hf.model import has_rotary_positions, headless_widths, load_plain_model, take_output
from ...hf.pooling import SentencePooling
from ...tensors import to_numpy, to_torch
from ..implementations import CASES_FILE, slot_names
from ..oracle import ReferenceAdapter, read_reference_adapter

Inputs = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]
Mix = tuple[tuple[int, float], ...]
"""What a row uses: (slot, weight) pairs; none for the base, one of weight 1 for an adapter."""
BASE: Mix = ()


def only(slot: int) -> Mix:
    """One adapter."""
    return ((slot, 1.0),)


@dataclass(frozen=True)
class RowCase:
    """A batch: what each row uses; of texts also the lengths, padded on one side."""

    name: str
    rows: tuple[Mix, ...]
    lengths: tuple[int, ...]
    left: bool = False

    @property
    def adapter_ids(self) -> np.ndarray:
        """int64 [batch]; 0 for rows that blend."""
        plain = [row[0][0] if _is_plain(row) else 0 for row in self.rows]
        return np.array(plain, dtype=np.int64)

    def adapter_weights(self, num_slots: int) -> np.ndarray:
        """float32 [batch, slots]; 0 but for rows that blend."""
        weights = np.zeros((len(self.rows), num_slots), np.float32)
        for index, row in enumerate(self.rows):
            for slot, weight in () if _is_plain(row) else row:
                weights[index, slot - 1] = weight
        return weights


def _is_plain(row: Mix) -> bool:
    return len(row) == 1 and row[0][1] == 1.0


@dataclass(frozen=True)
class ModelReference:
    """By case: inputs, and by output's name what is expected and what the base alone gives."""

    source: str
    inputs: dict[str, Inputs]
    expected: dict[str, Outputs]
    base_expected: dict[str, Outputs]


class ReferenceModel(Protocol):
    """A whole model that runs a batch with one mix of adapters, or none."""

    source: str
    """How a report speaks of it."""
    label: str
    """How an error speaks of it."""
    vocabulary: int
    pad: int

    def run(self, inputs: Inputs, mix: Mix) -> Outputs:
        """The outputs for a batch, all of whose rows use `mix`."""


def make_cases(manifest: Manifest, model: Model) -> tuple[RowCase, ...]:
    """Every adapter alone, all mixed (texts with either padding), base only, one row, blends."""
    names = slot_names(manifest)
    slots = sorted(names)
    has_base = all(layer.in_base for layer in manifest.layers)
    base = [BASE] if has_base else []
    mixed = (*map(only, slots), *base, only(slots[0]))
    lengths = tuple(3 + 4 * (index % 4) for index in range(len(mixed)))
    cases = [RowCase(f"alone-{names[slot]}", (only(slot),) * 2, (6, 10)) for slot in slots]
    cases.append(RowCase("mixed", mixed, lengths))
    if any("sequence" in entry.shape for entry in model.inputs):
        cases.append(RowCase("mixed-left", mixed[::-1], lengths, left=True))
    if has_base:
        cases.append(RowCase("base-only", (BASE, BASE), (5, 8)))
    cases.append(RowCase("one-row", (only(slots[-1]),), (9,)))
    if model.blend:
        first, last = slots[0], slots[-1]
        # 0.75 of one; a sum that is not 1 and a 0; all of them, one against the others.
        blends: list[Mix] = [((first, 0.75),), ((first, 0.0), (last, 1.5))]
        blends.append(tuple((slot, -0.5 if slot == first else 0.375) for slot in slots))
        rows = (*blends, only(last), *base)
        cases.append(RowCase("blend", rows, (4, 9, 6, 7, 5)[: len(rows)]))
    return tuple(cases)


def make_inputs(
    case: RowCase, entries: Sequence[TensorEntry], vocabulary: int, seed: int, pad: int = 0
) -> Inputs:
    """Random ids other than `pad`, and the masks that the lengths and the padding's side ask for.

    Images are standard normal, one per row; lengths mean nothing to them.
    Some models (RoBERTa) find positions, others (Llama, to classify) the last token, by `pad`.
    """
    generator = np.random.default_rng([seed, len(case.rows), *case.lengths, int(case.left)])
    shape = (len(case.rows), max(case.lengths))
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
        "position_ids": np.tile(np.arange(shape[1]), (shape[0], 1)),
    }
    return {entry.name: values[entry.name] for entry in entries}


def make_reference(
    plain: ReferenceModel, manifest: Manifest, model: Model, seed: int
) -> ModelReference:
    """Run a model once for each adapter or blend of each case."""
    inputs, expected, base_expected = {}, {}, {}
    for case in make_cases(manifest, model):
        values = make_inputs(case, model.inputs, plain.vocabulary, seed, plain.pad)
        base = plain.run(values, BASE)
        _require_finite(base, values, case, plain.label, model)
        whole = {name: y.copy() for name, y in base.items()}
        for mix in set(case.rows) - {BASE}:
            rows = np.array([row == mix for row in case.rows])
            for name, y in plain.run(values, mix).items():
                whole[name][rows] = y[rows]
        inputs[case.name], base_expected[case.name] = values, base
        expected[case.name] = whole
    return ModelReference(plain.source, inputs, expected, base_expected)


def read_adapters(folder: Path, manifest: Manifest) -> dict[int, ReferenceAdapter]:
    """The adapters that start loaded, as the oracle reads them, by slot."""
    sites = [part.site for layer in manifest.layers for part in layer.slices]
    return {
        entry.slot: read_reference_adapter(resolve(folder, entry.path), sites, entry.scale)
        for entry in manifest.adapters
        if entry.slot is not None
    }


def kept_tokens(inputs: Inputs, output: TensorEntry) -> np.ndarray:
    """What of an output is compared: bool [batch, sequence] without padding, or [batch]."""
    first = next(iter(inputs.values()))
    if "sequence" not in output.shape:
        return np.ones(len(first), dtype=bool)
    mask: np.ndarray = inputs.get("attention_mask", np.ones(first.shape[:2])) == 1
    return mask


def _require_finite(
    found: Outputs, inputs: Inputs, case: RowCase, label: str, model: Model
) -> None:
    for entry in model.outputs:
        keep = kept_tokens(inputs, entry)
        if not np.isfinite(found[entry.name][keep]).all():
            what = "padded texts" if "attention_mask" in inputs else "images"
            raise BaseModelError(
                f"{label} gives NaN or Inf for {what}, in {found[entry.name].dtype} and without"
                f" adapters (case {case.name!r}), so there is nothing to compare its graphs with"
            )


def save_reference(reference: ModelReference, folder: Path) -> None:
    """Keep inputs and expected outputs (as float32) in the artifact."""
    arrays: dict[str, np.ndarray] = {}
    for case, inputs in reference.inputs.items():
        arrays |= {f"{case}/x/{name}": value for name, value in inputs.items()}
        for part, every in (("y", reference.expected), ("base", reference.base_expected)):
            # In C's order: safetensors writes the memory as it lies.
            arrays |= {
                f"{case}/{part}/{name}": y.astype(np.float32, order="C")
                for name, y in every[case].items()
            }
    (folder / CASES_FILE).parent.mkdir(exist_ok=True)
    (folder / CASES_FILE).write_bytes(save(arrays))


def load_reference(folder: Path) -> ModelReference:
    """The reference that a build kept."""
    arrays = load_file(resolve(folder, CASES_FILE))
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {"x": {}, "y": {}, "base": {}}
    for key, array in arrays.items():
        case, part, name = key.split("/", 2)
        found[part].setdefault(case, {})[name] = array
    return ModelReference("the stored cases", found["x"], found["y"], found["base"])


class PlainModel:
    """The Hugging Face model without sites, into which adapters can be merged.

    Labels that a head lacks are given as the graphs give them (see stacks.lowest).
    """

    source = "the float64 model, merged"

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        model: Model,
        adapters: Mapping[int, ReferenceAdapter],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        headless = headless_widths(manifest.layers)
        self.model: Any = load_plain_model(directory, model.task, headless).to(dtype)
        self.pooling = None
        if model.task == "sentence-embedding":
            self.pooling = SentencePooling.read(directory)
        config: Any = self.model.config
        self.label = f"a model of type {config.model_type!r}"
        # A model of images has neither.
        self.vocabulary = getattr(config, "vocab_size", 0)
        self.pad = getattr(config, "pad_token_id", 0) or 0
        self._adapters = adapters
        self._output = model.outputs[0].name
        self._dtype = dtype
        self._labels = any(layer.labels for layer in manifest.layers)
        self._width = model.outputs[0].shape[-1]
        self._missing_label = lowest(NUMPY_DTYPES[manifest.dtype])

    def __call__(self, inputs: Inputs, **arguments: Any) -> np.ndarray:
        """The output for a batch, in the model's dtype; `arguments` go to the model as they are."""
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
        if self._labels:
            lacking = (0, int(self._width) - y.shape[-1])
            y = nn.functional.pad(y, lacking, value=self._missing_label)
        return to_numpy(y)

    def run(self, inputs: Inputs, mix: Mix) -> Outputs:
        """See ReferenceModel."""
        with merged_into(self.model, self._adapters, mix):
            return {self._output: self(inputs)}


@contextmanager
def merged_into(model: Any, adapters: Mapping[int, ReferenceAdapter], mix: Mix) -> Iterator[None]:
    """W + sum_i w_i (W_i - W) and its bias in every site of a float64 model, undone at the end."""
    kept = {}
    for site in {
        site for slot, _ in mix for site in (*adapters[slot].sites, *adapters[slot].heads)
    }:
        module = model.get_submodule(site)
        kept[site] = (module.weight, getattr(module, "bias", None))
        weight, bias = _blend(module, site, adapters, mix)
        # Parameters of its own: an embedding may be tied to this one, and stays as it is.
        module.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(torch.from_numpy(bias), requires_grad=False)
    try:
        yield
    finally:
        for site, (own_weight, own_bias) in kept.items():
            module = model.get_submodule(site)
            module.weight = own_weight
            if own_bias is not None or hasattr(module, "bias"):
                module.bias = own_bias


def _blend(
    module: Any, site: str, adapters: Mapping[int, ReferenceAdapter], mix: Mix
) -> tuple[np.ndarray, np.ndarray | None]:
    """The merged (weight, bias) as the module stores them."""
    # An embedding and a Conv1D store [in, out].
    turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    weight = module.weight.detach().numpy()
    weight = weight.T if turned else weight
    bias = getattr(module, "bias", None)
    own_bias = None if bias is None else bias.detach().numpy()
    parts = [(adapters[slot].merge(site, weight, own_bias), factor) for slot, factor in mix]
    if len(parts) == 1 and parts[0][1] == 1.0:  # exactly; a head may be of another width
        merged, merged_bias = parts[0][0]
    else:
        merged = weight + sum(factor * (one - weight) for (one, _), factor in parts)
        zero = np.zeros(len(weight))
        start = zero if own_bias is None else own_bias
        merged_bias = start + sum(
            factor * ((zero if one is None else one) - start) for (_, one), factor in parts
        )
    merged = merged.T if turned else merged
    return np.ascontiguousarray(merged), None if turned and own_bias is None else merged_bias
