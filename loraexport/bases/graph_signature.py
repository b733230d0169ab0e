"""What an ONNX graph takes and gives, and how each tensor's rows lie: seen by running it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loraexport_runtime.contract.foreign import has_file, read_object, value_of
from loraexport_runtime.contract.kinds import TensorEntry
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..errors import BaseModelError
from ..graphs.inputs import GRAPH_DTYPES, input_entry
from ..graphs.products import Layout
from ..graphs.sessions import open_graph
from ..graphs.tables import table_rows
from ..plan.graph import GraphPlan
from ..plan.plan import Plan
from .graph import find_sites

_EXAMPLES = ((3, 7), (2, 5))
"""(batch, sequence) of the runs that tell a graph's dimensions apart."""


@dataclass(frozen=True)
class Tokens:
    """Ids that a graph takes: below `vocabulary`; `pad` fills up."""

    vocabulary: int
    pad: int


@dataclass(frozen=True)
class GraphSignature:
    """What a graph takes and gives beside adapter_ids, and how its sites hold the rows."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    layouts: dict[str, tuple[Layout, int]]
    """Layer -> layout, and for flat rows how many belong to one, in the first example."""


def read_graph_signature(plan: Plan[GraphPlan], model: ir.Model) -> GraphSignature:
    """Run the graph on two batches and see which dimensions follow the rows and the tokens.

    Raises:
        BaseModelError: it takes what we cannot make up, cannot run, or has a dimension that follows
            neither.
    """
    label = str(plan.kind.file)
    inputs = tuple(input_entry(value, label) for value in model.graph.inputs)
    tokens = find_tokens(plan, model)
    sources = _add_site_outputs(plan, model.clone())
    session = open_graph(sources.model)
    runs = []
    for batch, sequence in _EXAMPLES:
        feeds = _example(inputs, tokens, batch, sequence)
        try:
            runs.append(dict(zip(sources.names, session.run(sources.names, feeds), strict=True)))
        except Exception as error:
            raise BaseModelError(
                f"{label}: it does not run on {batch} rows of {sequence} tokens: {error}"
            ) from error
    outputs = tuple(
        _output_entry(value, [run[str(value.name)].shape for run in runs], label)
        for value in model.graph.outputs
    )
    layouts = {
        layer: _layout(runs[0][name].shape, layer, label)
        for layer, name in sources.of_layer.items()
    }
    return GraphSignature(inputs, outputs, layouts)


@dataclass(frozen=True)
class _Sources:
    model: ir.Model
    names: list[str]
    of_layer: dict[str, str]
    """Layer -> the name of its sites' input."""


def _add_site_outputs(plan: Plan[GraphPlan], model: ir.Model) -> _Sources:
    """What the sites get becomes outputs too."""
    names = [str(value.name) for value in model.graph.outputs]
    of_layer = {}
    for site in find_sites(plan, plan.kind, model, {}):
        x = site.nodes[0].inputs[0]
        assert x is not None, "a product has an input"
        of_layer[site.layer.name] = str(x.name)
        if x.name not in names:
            names.append(str(x.name))
            model.graph.outputs.append(x)
    return _Sources(model, names, of_layer)


def _layout(shape: Sequence[int], layer: str, label: str) -> tuple[Layout, int]:
    batch = _EXAMPLES[0][0]
    if len(shape) == 3 and shape[0] == batch:
        return "batched", 0
    if len(shape) == 2 and shape[0] == batch:
        return "rows", 0
    if len(shape) == 2 and shape[0] % batch == 0:
        return "flat", shape[0] // batch
    raise BaseModelError(
        f"{label}: site {layer!r} gets a tensor of shape {list(shape)} for {batch} rows, where a"
        " batch of rows has to come first; its adapters cannot be told apart"
    )


def _output_entry(value: ir.Value, shapes: Sequence[Sequence[int]], label: str) -> TensorEntry:
    dtype = GRAPH_DTYPES.get(value.dtype.name if value.dtype is not None else "")
    sizes = []
    for place, pair in enumerate(zip(*shapes, strict=True)):
        follows = {_pair(0): "batch", _pair(1): "sequence"}
        size = str(pair[0]) if pair[0] == pair[1] else follows.get(pair)
        if size is None or (place == 0 and size != "batch"):
            raise BaseModelError(
                f"{label}: output {value.name!r} has the shapes {[list(shape) for shape in shapes]}"
                f" for {[list(example) for example in _EXAMPLES]} rows and tokens; each dimension"
                " has to follow one of them or be fixed, the first the rows"
            )
        sizes.append(size)
    if dtype is None:
        raise BaseModelError(
            f"{label}: output {value.name!r} is {value.dtype}; known are float32, float16 and int64"
        )
    return TensorEntry(str(value.name), dtype, tuple(sizes))  # type: ignore[arg-type]


def _pair(place: int) -> tuple[int, int]:
    return _EXAMPLES[0][place], _EXAMPLES[1][place]


def _example(
    inputs: Sequence[TensorEntry], tokens: Tokens, batch: int, sequence: int
) -> dict[str, np.ndarray]:
    """Ids other than the padding, none padded; pixels from -1 to 1."""
    ids = np.arange(batch * sequence).reshape(batch, sequence) % max(tokens.vocabulary - 1, 1)
    values: dict[str, np.ndarray] = {
        "input_ids": ids + (ids >= tokens.pad),
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(sequence), ids.shape),
    }
    for entry in inputs:
        if entry.name == "pixel_values":
            sizes = entry.sizes(batch, sequence)
            pixels = np.linspace(-1, 1, math.prod(sizes)).reshape(sizes)
            values[entry.name] = pixels.astype(NUMPY_DTYPES[entry.dtype])
    return {entry.name: np.ascontiguousarray(values[entry.name]) for entry in inputs}


def find_tokens(plan: Plan[GraphPlan], model: ir.Model) -> Tokens:
    """The vocabulary: rows of the table that input_ids look up; the padding as config.json says.

    Raises:
        BaseModelError: neither the graph nor the config says how large the vocabulary is.
    """
    file = plan.kind.directory / "config.json"
    config = read_object(file, BaseModelError) if has_file(file) else {}
    for key in ("pad_token_id", "vocab_size"):
        if config.get(key) is not None:
            value_of(config, key, int, file, BaseModelError)
    pad = config.get("pad_token_id") or 0
    if all(value.name != "input_ids" for value in model.graph.inputs):
        return Tokens(0, pad)
    rows = table_rows(model.graph, "input_ids") or config.get("vocab_size")
    if rows is not None:
        return Tokens(rows, pad)
    raise BaseModelError(
        f"{plan.kind.file}: no table that input_ids look up, and no vocab_size in {file}; put the"
        " model's config.json there"
    )
