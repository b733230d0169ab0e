"""Prompts, read into their rows of a cache, or into a cache of their own and copied.

onnxruntime's attention takes, with a past, one token of each row or several of one row, and without
a past the prompts of several rows, which have to lie side by side. So a run is one of these; and
what several prompts are read into is not where their rows are.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from ...contract.kinds import ADAPTER_WEIGHTS, GOES_ON, LENGTHS, PLACES, ROWS
from ...device.captures import capturing
from ...device.dtypes import ONNX_TYPES
from ...device.memory import host_value
from ...device.providers import graph_options
from ...slots.batch import weight_rows
from ...slots.lease import BASE_USE, RowUse
from ..rope import READ_LENGTHS
from .cache import Cache
from .decoder_graph import DecoderGraph
from .host_logits import HostLogits
from .step import NOTHING, bind_rows, dtype_of, mask
from .top_tokens import RowLogits

_LOG = logging.getLogger(__name__)
MOST_TOKENS = 1024
"""Of prompts that are read together, what fills them up counted too: with as many the device
computes for longer than its kernels are launched."""
_PROMPTS, _SIZES = (1, 2, 3, 4, 5, 6, 8), (64, 128, 192, 256, 320, 384, 448, 512)
"""Prompts of a captured run, and tokens of each."""
_SAME = ("position_ids", GOES_ON, PLACES)
"""Inputs that are the same for all prompts of a captured run."""


@dataclass(frozen=True)
class PromptRead:
    """What came of a run over prompts."""

    likeliest: np.ndarray
    """int64 [m]: after each prompt."""
    num_tokens: int
    """That were read, those that fill prompts up counted too."""
    told: tuple[int, ...]
    """There are logits after so many tokens of each prompt: its last one, or all."""
    rows: RowLogits | HostLogits
    memory: ort.OrtValue
    vocabulary: int

    @property
    def width(self) -> int:
        """From the logits of one prompt to those of the next one, in tokens."""
        return max(self.told)

    def places(self, at: int) -> np.ndarray:
        """int64 [n]: where the logits of one of the prompts lie."""
        return at * self.width + np.arange(self.told[at])

    def logits(self, places: np.ndarray) -> np.ndarray:
        """float32 [m, vocabulary]; until the next prompts are read."""
        shape = [len(self.told), self.width, self.vocabulary]
        return self.rows.read(self.memory, shape, places)


def read_prompts(
    graph: DecoderGraph,
    cache: Cache,
    row: int,
    prompts: Sequence[np.ndarray],
    uses: Sequence[RowUse],
    past: int,
    wholes: Sequence[int],
    logits: int,
    tells_all: bool = False,
    meanwhile: AbstractContextManager[None] = NOTHING,
) -> np.ndarray:
    """Read tokens into neighbouring rows; the likeliest token after each, int64 [m], if the graph
    gives it, else 0.

    Args:
        row: the first of them.
        prompts: int64 [n] of each row; padded on the right, where they differ.
        past: how many tokens the row has already; 0 for more than one row.
        wholes: the length of the text that each is a part of.
        logits: the address for [m, told, vocabulary] on the device.
        tells_all: one row's logits after all of its n tokens, and not after the last one alone.
        meanwhile: what is done as the device computes.
    """
    rows, longest = len(prompts), max(map(len, prompts))
    assert rows == 1 or past == 0, "several rows are read from their beginning"
    told = longest if tells_all or graph.tells_all else 1
    binding = graph.session.io_binding()
    for name, array in _prompt_feeds(graph, prompts, uses, past, wholes, longest, told).items():
        binding.bind_ortvalue_input(name, host_value(array, dtype_of(name)))
    chosen = np.zeros((rows, 1), dtype=np.int64)
    if graph.next:
        place = ("cpu", 0, ONNX_TYPES["int64"], chosen.shape, chosen.ctypes.data)
        binding.bind_output(graph.next["input_ids"], *place)
    bind_rows(graph, binding, cache, row, rows, [rows, told, graph.vocabulary], logits)
    options = graph_options(-1) if graph.capture else None
    cache.wait()
    with meanwhile:
        graph.session.run_with_iobinding(binding, options)
    binding.synchronize_outputs()
    return chosen[:, 0]


def _prompt_feeds(
    graph: DecoderGraph,
    prompts: Sequence[np.ndarray],
    uses: Sequence[RowUse],
    past: int,
    wholes: Sequence[int],
    width: int,
    told: int = 1,
) -> dict[str, np.ndarray]:
    """What the graph takes of prompts that are filled up to `width` tokens on the right; `told`: so
    many tokens at the end of each have logits."""
    rows, lengths = len(prompts), np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((rows, width), dtype=np.int64)
    for index, prompt in enumerate(prompts):
        ids[index, : len(prompt)] = prompt
    ends = past + lengths[:, None]
    feeds = {
        "input_ids": ids,
        "attention_mask": mask(ends, past + width),
        "position_ids": np.tile(past + np.arange(width), (rows, 1)),
        "adapter_ids": np.array([use.slot for use in uses], dtype=np.int64),
        ROWS: (np.arange(rows) * width + lengths)[:, None] + np.arange(-told, 0),
        LENGTHS: ends,
        GOES_ON: np.ones_like(ends),
        PLACES: np.arange(past + width)[None],
    }
    feeds = {name: array for name, array in feeds.items() if name in graph.inputs}
    if graph.blend_slots is not None:
        feeds[ADAPTER_WEIGHTS] = weight_rows([use.weights for use in uses], graph.blend_slots)
    if graph.takes_lengths:
        feeds[READ_LENGTHS] = np.array(wholes, dtype=np.int64)
    return feeds


class PromptGraph:
    """Prompts of up to so many tokens from their beginning, as a CUDA graph: a run of so few tokens
    is mostly launches. They are read into a cache of their own, as an address cannot change.
    """

    def __init__(self, graph: DecoderGraph, cache: Cache, logits: ort.OrtValue) -> None:
        """
        Args:
            cache: of as many rows and tokens as the prompts have.
            logits: memory for [rows, 1, vocabulary].
        """
        self.cache, self.logits = cache, logits
        self._graph = graph
        self._graph_id = graph.next_graph_id()
        self._options = graph_options(self._graph_id)
        self._values = {
            name: graph.upload(array) for name, array in self._feeds(*_no_prompts(1)).items()
        }
        self._chosen = graph.upload(np.zeros((cache.rows, 1), np.int64))
        binding = graph.session.io_binding()
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(graph.next["input_ids"], self._chosen)
        shape = [cache.rows, 1, graph.vocabulary]
        bind_rows(graph, binding, cache, 0, cache.rows, shape, int(logits.data_ptr()))
        self._binding = binding

    def run(
        self,
        prompts: Sequence[np.ndarray],
        uses: Sequence[RowUse],
        wholes: Sequence[int],
        meanwhile: AbstractContextManager[None] = NOTHING,
    ) -> np.ndarray:
        """The likeliest token after each prompt, int64 [m]; the first run captures."""
        for name, array in self._feeds(prompts, uses, wholes).items():
            if name not in _SAME:
                self._values[name].update_inplace(array)
        self.cache.clear_all()  # another tenant's
        self.cache.wait()
        with meanwhile:
            self._graph.session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        chosen: np.ndarray = self._chosen.numpy()
        return chosen[: len(prompts), 0]

    def release(self) -> None:
        """Let go of the graph that was captured."""
        self._graph.session.release_captured_graph(self._graph_id)

    def _feeds(
        self, prompts: Sequence[np.ndarray], uses: Sequence[RowUse], wholes: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Rows that have no prompt read one token in the base."""
        idle = _no_prompts(self.cache.rows - len(prompts))
        filled = [*prompts, *idle[0]], [*uses, *idle[1]], 0, [*wholes, *idle[2]]
        return _prompt_feeds(self._graph, *filled, self.cache.length)


def _no_prompts(num: int) -> tuple[list[np.ndarray], list[RowUse], list[int]]:
    return [np.zeros(1, np.int64)] * num, [BASE_USE] * num, [1] * num


class PromptCache:
    """Where prompts are read that are for rows anywhere, and the captured graphs that do it, each
    made when it is first needed; none where nothing is captured."""

    def __init__(self, graph: DecoderGraph, rows: int, length: int) -> None:
        """`rows` and `length` of the cache for which prompts are read."""
        shapes = [(num, size) for num in _PROMPTS for size in _SIZES if graph.capture]
        self.shapes = [
            (num, size)
            for num, size in sorted(shapes, key=math.prod)
            if num <= rows and size <= length and num * size <= MOST_TOKENS
        ]
        """Prompts and tokens of each of the captured runs, the cheapest first."""
        self._graph = graph
        self._made: dict[tuple[int, int], PromptGraph] = {}
        self._room: Cache | None = None
        self._logits: ort.OrtValue | None = None

    def shape_for(self, num: int, tokens: int) -> tuple[int, int] | None:
        """Of the cheapest captured run that takes so many prompts of up to so many tokens; None:
        none does."""
        fit = (shape for shape in self.shapes if shape[0] >= num and shape[1] >= tokens)
        return next(fit, None)

    def joined_tokens(self, num: int, tokens: int) -> int | None:
        """Of the run over so many prompts of up to so many tokens; None: they are too many."""
        shape = self.shape_for(num, tokens)
        size = num * tokens if shape is None else math.prod(shape)
        return size if num == 1 or size <= MOST_TOKENS else None

    def captured(self, num: int, tokens: int) -> PromptGraph:
        """The run of a shape, captured if it is not there yet."""
        shape, graph = (num, tokens), self._graph
        if shape in self._made:
            return self._made[shape]
        if self._logits is None:
            size = [max(_PROMPTS), 1, graph.vocabulary]
            self._logits = graph.allocate(size, graph.logits_dtype)
        made = PromptGraph(graph, self.room(*shape), self._logits)
        with capturing(graph.device):
            made.run(*_no_prompts(1))
        _LOG.info("captured %d prompts of up to %d tokens", *shape)
        self._made[shape] = made
        return made

    def room(self, num: int, tokens: int) -> Cache:
        """A cache for so many prompts of up to so many tokens, in the memory that is for all."""
        assert num * tokens <= MOST_TOKENS, "no run of the engine has more"
        if self._room is None:
            self._room = Cache(self._graph, 1, MOST_TOKENS)
        return Cache(self._graph, num, tokens, self._room)

    def release(self) -> None:
        """Give graphs and memory up."""
        for made in self._made.values():
            made.release()
        self._made.clear()
        self._room = self._logits = None
