"""A decoder's graph over memory of its own: past and present in one buffer, each of full length.

So a step has the same shapes and addresses every time, as a CUDA graph wants it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import onnxruntime as ort

from ...device.providers import NUMPY_DTYPES, ONNX_TYPES, graph_options, host_value
from .next_inputs import LENGTHS, PLACES, ROWS, next_inputs
from .top_tokens import BoundTopTokens, TopTokens

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}


@dataclass(frozen=True)
class DecoderGraph:
    """A session, and what its graph takes and gives."""

    session: ort.InferenceSession
    device: tuple[str, int]
    capture: bool
    inputs: frozenset[str]
    """Those of a batch: input_ids, attention_mask and the like, and the tail's."""
    next: Mapping[str, str]
    """Input of a step -> the output that becomes the next step's."""
    present: Mapping[str, str]
    """Input -> output of every layer's keys and values."""
    cache_dtype: str
    heads: int
    head_size: int
    logits_dtype: str
    vocabulary: int
    _graph_ids: Iterator[int] = field(default_factory=lambda: count(1))

    def allocate(self, shape: list[int], dtype: str) -> ort.OrtValue:
        """Memory on the session's device."""
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[dtype], *self.device)

    def upload(self, array: np.ndarray) -> ort.OrtValue:
        """int64 in memory of its own on the session's device."""
        value = self.allocate(list(array.shape), "int64")
        value.update_inplace(array)
        return value

    def next_graph_id(self) -> int:
        """For a graph to capture; none is given twice, as none may be replayed on other memory."""
        return next(self._graph_ids)


def read_graph(
    session: ort.InferenceSession,
    decoder: Mapping[str, Any],
    device: tuple[str, int],
    capture: bool,
) -> DecoderGraph:
    """The graph of a session, with its tail; `decoder`: of genai_config.json."""
    taken = {one.name: one for one in session.get_inputs()}
    given = {one.name: one for one in session.get_outputs()}
    names = decoder["inputs"], decoder["outputs"]
    present = {
        names[0][f"past_{part}_names"] % layer: names[1][f"present_{part}_names"] % layer
        for layer in range(int(decoder["num_hidden_layers"]))
        for part in ("key", "value")
    }
    logits = given["logits"]
    return DecoderGraph(
        session=session,
        device=device,
        capture=capture,
        inputs=frozenset(taken) - frozenset(present),
        next=next_inputs(decoder["inputs"].values()),
        present=present,
        cache_dtype=_DTYPES[taken[next(iter(present))].type],
        heads=int(decoder["num_key_value_heads"]),
        head_size=int(decoder["head_size"]),
        logits_dtype=_DTYPES[logits.type],
        vocabulary=int(logits.shape[2]),
    )


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


class Cache:
    """The keys and values of one call at a time, as large as its largest batch so far."""

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._size = 0
        self._memory: dict[str, ort.OrtValue] = {}
        self._zeros: ort.OrtValue | None = None
        self._logits: ort.OrtValue | None = None
        self._steps: dict[tuple[int, int], Step] = {}

    def step(self, rows: int, length: int) -> "Step":
        """The step of batches of this size; each size has one, over the same memory."""
        graph = self._graph
        if rows * length > self._size:
            self.release()
            shape = [rows * length * graph.heads * graph.head_size]
            zeros = np.zeros(shape, NUMPY_DTYPES[graph.cache_dtype])
            self._zeros = graph.allocate(shape, graph.cache_dtype)
            self._zeros.update_inplace(host_value(zeros, graph.cache_dtype))
            for name in graph.present:
                self._memory[name] = graph.allocate(shape, graph.cache_dtype)
            self._size = rows * length
        if (rows, length) not in self._steps:
            self.clear()  # a new step may run to be captured
            self._steps[rows, length] = Step(graph, self._memory, rows, length)
        return self._steps[rows, length]

    def clear(self) -> None:
        """Zeros everywhere: a kernel multiplies what an earlier batch left behind a row's end by 0,
        which is no number for what was none."""
        for memory in self._memory.values():
            memory.update_inplace(self._zeros)

    def logits(self, shape: Sequence[int]) -> int:
        """The address of memory for the logits of prompts, as large as the most so far."""
        size = math.prod(shape)
        if self._logits is None or math.prod(self._logits.shape()) < size:
            self._logits = None  # first, so that both are never there
            self._logits = self._graph.allocate([size], self._graph.logits_dtype)
        return int(self._logits.data_ptr())

    def release(self) -> None:
        """Let go of the memory, and of the graphs that were captured over it."""
        for step in self._steps.values():
            step.release()
        self._steps.clear()
        self._memory.clear()
        self._size = 0


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
