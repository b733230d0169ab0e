"""Prompts, read into a row of a cache, or into some that lie side by side.

onnxruntime's attention takes, with a past, one token of each row or several of one row, and without
a past the prompts of several rows. So a run is one of these.
"""

import logging
from collections.abc import Sequence

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
from .step import bind_rows, dtype_of, mask

_LOG = logging.getLogger(__name__)
_SIZES = (32, 64, 128, 256, 512)
"""Tokens of the captured graphs."""


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
    """A prompt of up to so many tokens from its beginning, as a CUDA graph: a run of so few tokens
    is mostly launches. It is read into a row of a cache of its own, as an address cannot change.
    """

    def __init__(
        self, graph: DecoderGraph, cache: Cache, logits: ort.OrtValue, tokens: int
    ) -> None:
        """
        Args:
            cache: of one row, of so many tokens at least.
            logits: memory for [1, 1, vocabulary].
        """
        self.tokens, self.cache, self.logits = tokens, cache, logits
        self._graph = graph
        self._graph_id = graph.next_graph_id()
        self._options = graph_options(self._graph_id)
        self._values = {
            name: graph.upload(array)
            for name, array in self._feeds(np.zeros(tokens, np.int64), BASE_USE, tokens).items()
        }
        self._chosen = graph.upload(np.zeros((1, 1), np.int64))
        binding = graph.session.io_binding()
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(graph.next["input_ids"], self._chosen)
        shape = [1, 1, graph.vocabulary]
        bind_rows(graph, binding, cache, 0, 1, shape, int(logits.data_ptr()))
        self._binding = binding

    def run(self, prompt: np.ndarray, use: RowUse, whole: int) -> int:
        """The likeliest token after a prompt; the first run captures."""
        for name, array in self._feeds(prompt, use, whole).items():
            self._values[name].update_inplace(array)
        self.cache.clear(0, 0, self.cache.length)  # another tenant's
        self._graph.session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        return int(self._chosen.numpy()[0, 0])

    def release(self) -> None:
        """Let go of the graph that was captured."""
        self._graph.session.release_captured_graph(self._graph_id)

    def _feeds(self, prompt: np.ndarray, use: RowUse, whole: int) -> dict[str, np.ndarray]:
        return _prompt_feeds(self._graph, [prompt], [use], 0, [whole], self.tokens)


class PromptGraphs:
    """The captured graphs for prompts, each made when it is first needed, and the row that they
    read into; none where nothing is captured."""

    def __init__(self, graph: DecoderGraph, length: int) -> None:
        """`length`: of the rows for which prompts are read."""
        self.sizes = tuple(size for size in _SIZES if graph.capture and size <= length)
        self._graph = graph
        self._made: dict[int, PromptGraph] = {}
        self._row: tuple[Cache, ort.OrtValue] | None = None

    def find(self, prompts: Sequence[np.ndarray], past: int) -> PromptGraph | None:
        """The smallest that takes these prompts of neighbouring rows; None: none does."""
        size = self.size_for(len(prompts[0])) if past == 0 and len(prompts) == 1 else None
        return None if size is None else self.make(size)

    def size_for(self, tokens: int) -> int | None:
        """Of the smallest that takes a prompt of so many tokens; None: none does."""
        return next((size for size in self.sizes if size >= tokens), None)

    def make(self, tokens: int) -> PromptGraph:
        """Capture the one of so many tokens, if it is not there yet."""
        if tokens in self._made:
            return self._made[tokens]
        if self._row is None:
            size = [1, 1, self._graph.vocabulary]
            logits = self._graph.allocate(size, self._graph.logits_dtype)
            self._row = Cache(self._graph, 1, self.sizes[-1]), logits
        made = PromptGraph(self._graph, *self._row, tokens)
        with capturing(self._graph.device):
            made.run(np.zeros(1, np.int64), BASE_USE, 1)
        _LOG.info("captured prompts of up to %d tokens", tokens)
        self._made[tokens] = made
        return made

    def release(self) -> None:
        """Give them and their memory up."""
        for made in self._made.values():
            made.release()
        self._made.clear()
        if self._row is not None:
            self._row[0].release()
        self._row = None
