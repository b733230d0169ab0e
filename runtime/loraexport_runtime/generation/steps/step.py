"""One more token for the first rows of a cache, captured or not."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import onnxruntime as ort

from ...contract.kinds import ADAPTER_WEIGHTS, GOES_ON, LENGTHS, PLACES, ROWS
from ...device.dlpack import rows_view
from ...device.dtypes import ONNX_TYPES
from ...device.providers import graph_options
from ...slots.batch import weight_rows
from ...slots.lease import BASE_USE, RowUse
from .cache import Cache
from .decoder_graph import DecoderGraph

NOTHING = nullcontext()
"""Done as a device computes."""


class RowInputs:
    """What a step reads of every row, in the device's memory, at addresses that stay.

    A step leaves here what the next one takes: the likeliest tokens, and lengths, masks and
    positions that are one further, but for rows that do not go on.
    """

    def __init__(self, graph: DecoderGraph, rows: int, length: int) -> None:
        self._length = length
        ones = np.ones((rows, 1), dtype=np.int64)
        first = {
            "input_ids": 0 * ones,
            "attention_mask": mask(ones, length),
            "position_ids": 0 * ones,
            "adapter_ids": 0 * ones,
            ROWS: np.arange(rows)[:, None],
            LENGTHS: ones,
            GOES_ON: 0 * ones,
            PLACES: np.arange(length)[None],
            ADAPTER_WEIGHTS: np.zeros((rows, graph.blend_slots or 0), np.float32),
        }
        self._blend_slots = graph.blend_slots
        self._rows = [(0, 1, BASE_USE, False)] * rows
        """(token, length, use, goes on) of each, as it was put last, and then advanced."""
        self._changed: set[int] = set()
        """Rows that were put since the last step."""
        self.values = {
            name: graph.upload(array) for name, array in first.items() if name in graph.inputs
        }
        self._views: dict[tuple[str, int, int], ort.OrtValue] = {}

    def put(self, row: int, token: int, length: int, use: RowUse, goes_on: bool) -> None:
        """All of one row, to be there at the next `write`.

        Args:
            token: that the next step reads.
            length: of the row's tokens, with that one.
            use: its adapter's slot, or the weights of several.
        """
        self._rows[row] = (token, length, use, goes_on)
        self._changed.add(row)

    def write(self) -> None:
        """Write what was put to the device, neighbouring rows at once: a copy there waits."""
        rows = sorted(self._changed)
        self._changed.clear()
        for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
            self._write([row for _, row in run])

    def _write(self, rows: Sequence[int]) -> None:
        tokens, lengths, uses, goes_on = zip(*(self._rows[row] for row in rows), strict=True)
        ends = _column(lengths)
        values = {
            "input_ids": _column(tokens),
            "position_ids": ends - 1,
            "adapter_ids": _column([use.slot for use in uses]),
            LENGTHS: ends,
            GOES_ON: _column(goes_on),
        }
        if "attention_mask" in self.values:
            values["attention_mask"] = mask(ends, self._length)
        if self._blend_slots is not None:
            values[ADAPTER_WEIGHTS] = weight_rows([use.weights for use in uses], self._blend_slots)
        for name in values.keys() & self.values.keys():
            self._view(name, rows[0], rows[-1] + 1).update_inplace(values[name])

    def advance(self, tokens: np.ndarray) -> None:
        """Leave what the next step takes in the first rows, after a graph that does not.

        Args:
            tokens: int64 [m], the likeliest.
        """
        for row, token in enumerate(tokens.tolist()):
            _, length, use, goes_on = self._rows[row]
            self.put(row, token, length + goes_on, use, goes_on)
        self.write()

    def put_tokens(self, tokens: np.ndarray) -> None:
        """What the next step reads in the first rows, int64 [m], but in those that are put."""
        self._view("input_ids", 0, len(tokens)).update_inplace(tokens[:, None])

    def tokens(self, num: int) -> np.ndarray:
        """int64 [num]: the likeliest after a step, of the first rows."""
        tokens: np.ndarray = self.values["input_ids"].numpy()
        return tokens[:num, 0].copy()

    def _view(self, name: str, start: int, stop: int) -> ort.OrtValue:
        """Some rows of a value, kept: to make a view takes longer than to fill it."""
        key = name, start, stop
        if key not in self._views:
            value = self.values[name]
            width = value.shape()[1]
            self._views[key] = rows_view(value, slice(start, stop), width, dtype_of(name))
        return self._views[key]


class Step:
    """One more token for each of the first rows."""

    def __init__(
        self, graph: DecoderGraph, cache: Cache, inputs: RowInputs, rows: int, logits: int
    ) -> None:
        """
        Args:
            logits: the address for [rows, 1, vocabulary] on the device.
        """
        self.rows = rows
        self._graph = graph
        self._graph_id = graph.next_graph_id() if graph.capture else None
        self._options = None if self._graph_id is None else graph_options(self._graph_id)
        binding = graph.session.io_binding()
        for name, value in inputs.values.items():
            width = [] if name == "adapter_ids" else [value.shape()[1]]
            shape = [1 if name == PLACES else rows, *width]
            place = (*graph.device, ONNX_TYPES[dtype_of(name)], shape, value.data_ptr())
            binding.bind_input(name, *place)
            if name in graph.next:
                binding.bind_output(graph.next[name], *place)
        bind_rows(graph, binding, cache, 0, rows, [rows, 1, graph.vocabulary], logits)
        self._binding = binding

    def run(self) -> None:
        """A first run that captures is several of the graph: no row may go on then. What was put
        has been written."""
        self._graph.session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()  # what follows reads on streams of its own

    def release(self) -> None:
        """Let go of the graph that was captured."""
        if self._graph_id is not None:
            self._graph.session.release_captured_graph(self._graph_id)


def bind_rows(
    graph: DecoderGraph,
    binding: Any,
    cache: Cache,
    row: int,
    rows: int,
    shape: Sequence[int],
    logits: int,
) -> None:
    """Bind the cache of some rows as past and present, and the memory of their logits."""
    for name, (sizes, address) in cache.places(row, rows).items():
        place = (*graph.device, ONNX_TYPES[graph.cache_dtype], sizes, address)
        binding.bind_input(name, *place)
        binding.bind_output(graph.present[name], *place)
    place = (*graph.device, ONNX_TYPES[graph.logits_dtype], list(shape), logits)
    binding.bind_output("logits", *place)


def dtype_of(name: str) -> str:
    return "float32" if name == ADAPTER_WEIGHTS else "int64"


def _column(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)[:, None]


def mask(lengths: np.ndarray, places: int) -> np.ndarray:
    """int64 [rows, places]: 1 before a row's length, of [rows, 1]."""
    return (np.arange(places) < lengths).astype(np.int64)
