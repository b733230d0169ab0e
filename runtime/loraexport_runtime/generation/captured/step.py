"""One decode step over a KV cache, its inputs bound in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ...device.dtypes import ONNX_TYPES
from ...device.memory import host_value
from ...device.providers import graph_options
from .decoder_graph import DecoderGraph
from .next_inputs import LENGTHS, PLACES, ROWS
from .top_tokens import BoundTopTokens, TopTokens


@dataclass(frozen=True)
class Prompts:
    """Of a batch, padded on the right; rows that nobody asked for fill it up to a power of two."""

    ids: np.ndarray
    """int64 [rows, n]."""
    lengths: np.ndarray
    """int64 [rows]."""
    adapter_ids: np.ndarray
    """int64 [rows], for every step to come too."""
    num: int
    """So many rows were asked for, the first ones."""

    @property
    def last(self) -> np.ndarray:
        """int64 [rows], each row's last token among the rows * n."""
        rows, longest = self.ids.shape
        last: np.ndarray = np.arange(rows) * longest + self.lengths - 1
        return last


class Step:
    """One more token for every row of a batch; and the batch's prompts, in the same cache.

    Either leaves the inputs of the next step where the step reads them: the likeliest tokens, and
    a mask and positions that are one further.
    """

    def __init__(
        self, graph: DecoderGraph, memory: Mapping[str, ort.OrtValue], rows: int, length: int
    ) -> None:
        self.rows, self.length = rows, length
        self.graph_id = graph.next_graph_id() if graph.capture else None
        self._graph = graph
        self._memory = dict(memory)
        one = np.ones((rows, 1), dtype=np.int64)
        first = {"input_ids": 0 * one, "attention_mask": _mask(one, length)}
        first |= {"position_ids": 0 * one, "adapter_ids": 0 * one[:, 0]}
        first |= {ROWS: np.arange(rows), LENGTHS: one, PLACES: np.arange(length)[None]}
        self._inputs = {
            name: graph.upload(array) for name, array in first.items() if name in graph.inputs
        }
        self._logits = graph.allocate([rows, 1, graph.vocabulary], graph.logits_dtype)
        self._binding = self._bind(self._inputs, int(self._logits.data_ptr()), 1)
        self._options = None if self.graph_id is None else graph_options(self.graph_id)
        self._top: dict[int, BoundTopTokens] = {}
        if graph.capture:
            # Before any prompts: a run that captures is several of the graph, and each advances.
            self.run()

    def top(self, tokens: TopTokens, num: int) -> BoundTopTokens:
        """The highest `num` of every row, after each `run`."""
        if num not in self._top:
            shape = [self.rows, 1, self._graph.vocabulary]
            rows = np.arange(self.rows)
            address = int(self._logits.data_ptr())
            self._top[num] = tokens.bind(address, shape, rows, num)
        return self._top[num]

    def release(self) -> None:
        """Let go of the graph that was captured."""
        if self.graph_id is not None:
            self._graph.session.release_captured_graph(self.graph_id)

    def read(self, prompts: Prompts, logits: int) -> None:
        """Start over with new prompts.

        Args:
            logits: the address for [rows, n, vocabulary] on the device.
        """
        graph, ids = self._graph, prompts.ids
        lengths, longest = prompts.lengths[:, None], ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": _mask(lengths, longest),
            "position_ids": np.tile(np.arange(longest), (self.rows, 1)),
            ROWS: prompts.last,
            LENGTHS: lengths,
        }
        if "adapter_ids" in self._inputs:
            self._inputs["adapter_ids"].update_inplace(prompts.adapter_ids)
        own = {name: host_value(feeds[name], "int64") for name in self._inputs.keys() & feeds}
        binding = self._bind(self._inputs | own, logits, longest)
        options = graph_options(-1) if graph.capture else None
        graph.session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()

    def run(self) -> None:
        """One more token of every row."""
        self._graph.session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()  # what follows reads on streams of its own

    def tokens(self) -> np.ndarray:
        """int64 [rows], the likeliest after `read` or `run`, which the next `run` takes."""
        tokens: np.ndarray = self._inputs["input_ids"].numpy()
        return tokens[:, 0].copy()

    def put(self, tokens: np.ndarray) -> None:
        """Let the next `run` take these instead, int64 [rows]."""
        self._inputs["input_ids"].update_inplace(tokens[:, None])

    def _bind(self, inputs: Mapping[str, ort.OrtValue], logits: int, tokens: int) -> Any:
        graph = self._graph
        binding = graph.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        shape = [self.rows, graph.heads, self.length, graph.head_size]
        for name, value in self._memory.items():
            place = (*graph.device, ONNX_TYPES[graph.cache_dtype], shape, value.data_ptr())
            binding.bind_input(name, *place)
            binding.bind_output(graph.present[name], *place)
        sizes = [self.rows, tokens, graph.vocabulary]
        place = (*graph.device, ONNX_TYPES[graph.logits_dtype], sizes, logits)
        binding.bind_output("logits", *place)
        for name, output in graph.next.items():
            value = self._inputs[name]
            place = (*graph.device, ONNX_TYPES["int64"], value.shape(), value.data_ptr())
            binding.bind_output(output, *place)
        return binding


def _mask(lengths: np.ndarray, places: int) -> np.ndarray:
    """int64 [rows, places]: 1 before a row's length, of [rows, 1]."""
    return (np.arange(places) < lengths).astype(np.int64)
