"""A decoder's graph over memory of its own: past and present in one buffer, each of full length.

So a step has the same shapes and addresses every time, as a CUDA graph wants it.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from ...device.dtypes import NUMPY_DTYPES
from ...device.memory import host_value
from .decoder_graph import DecoderGraph
from .step import Step


class Cache:
    """The keys and values of one call at a time, as large as its largest batch so far."""

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._size = 0
        self._memory: dict[str, ort.OrtValue] = {}
        self._zeros: ort.OrtValue | None = None
        self._logits: ort.OrtValue | None = None
        self._steps: dict[tuple[int, int], Step] = {}

    def has_step(self, rows: int, length: int) -> bool:
        """Whether the step of this size is there already, in memory that is large enough."""
        return (rows, length) in self._steps

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
        self._zeros = self._logits = None
        self._size = 0
