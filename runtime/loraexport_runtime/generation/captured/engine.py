"""A decoder's graph in a plain session, driven step by step, its steps captured as CUDA graphs.

onnxruntime-genai cannot capture a batch: it would read the prompts with a past, and its attention
takes one token of a row then. Here the prompts are read without one and uncaptured, over the very
memory that the captured steps use. A step chooses the likeliest tokens itself and goes on from
them, so that a greedy one brings nothing to the device.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ...contract.genai_config import read_genai_config
from ...device import providers as devices
from ...device.ort_session import open_session, require_device
from ...errors import ProviderError
from ..engine import Sampling
from ..sampling import choose
from .cache import Cache
from .decoder_graph import read_decoder_graph
from .next_inputs import write_tail
from .step import Prompts, Step
from .top_tokens import BoundTopTokens, TopTokens

_LOG = logging.getLogger(__name__)
_LENGTHS = 256
"""A cache's length is a multiple of this, or the model's whole context."""
_IDLE = 2
"""So many caches are kept when no call uses them."""
_P = ParamSpec("_P")
_T = TypeVar("_T")


class DrivenEngine:
    """A decoder's session, and the caches of the calls that run now or have run last.

    One thread does all the work: onnxruntime keeps a captured graph with the thread that made it,
    and a session with such graphs makes one run at a time.
    """

    def __init__(
        self,
        folder: Path,
        pad: int,
        providers: list[tuple[str, dict[str, Any]]],
        capture: bool | None = None,
    ) -> None:
        """Open the graph of a folder with a genai_config.json.

        Args:
            capture: the steps as CUDA graphs; else they run over the same memory as they are.
                Default: where the first provider is CUDA.

        Raises:
            ProviderError: the provider cannot run here, or cannot capture this graph.
        """
        config = read_genai_config(folder)
        if not config["search"].get("past_present_share_buffer"):
            raise ProviderError(
                f"{folder}: past and present of this graph do not share a buffer, so its steps"
                " cannot be captured; pass cuda_graphs=False"
            )
        decoder = config["model"]["decoder"]
        device = devices.session_device(providers[0])
        require_device(device)
        capture = device[0] == "cuda" if capture is None else capture
        pairs = devices.with_cuda_graphs(providers) if capture else providers
        try:
            tail = write_tail(decoder["inputs"].values())
            session = open_session(folder / decoder["filename"], pairs, {}, None, tail)
        except ProviderError as error:
            if not capture:
                raise
            raise ProviderError(
                f"{error}. If its steps cannot be captured, pass cuda_graphs=False"
            ) from error
        self._graph = read_decoder_graph(session, decoder, device, capture)
        graph = self._graph
        self._top = TopTokens(graph.logits_dtype, graph.vocabulary, providers)
        self._pad = pad
        self._context = int(config["model"]["context_length"])
        self._idle: deque[Cache] = deque()
        self._is_closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loraexport-decode")

    def start(
        self, tokens: Sequence[list[int]], slots: np.ndarray, steps: int, sampling: Sampling
    ) -> Generator[np.ndarray, None, None]:
        """The next token of every row at a time, int64 [batch]: `steps` times, past any end."""
        prompts = self._pad_prompts(tokens, slots)
        rows, longest = prompts.ids.shape
        length = min(-(-(longest + steps) // _LENGTHS) * _LENGTHS, self._context)
        cache = self._take()
        try:
            step = self._do(self._step, cache, rows, length)
            if sampling.is_greedy:
                yield from self._greedy(cache, step, prompts, steps)
            else:
                yield from self._sampled(cache, step, prompts, steps, sampling)
        finally:
            # Maybe in another thread, or while Python collects garbage: so without a lock of ours.
            if not self._is_closed:
                self._idle.append(cache)

    def warm_up(self, rows: int, length: int) -> None:
        """Take the memory and capture the step of batches of this size ahead of the first one.

        Args:
            length: of the longest prompt and the new tokens together.
        """
        prompts, slots = [[self._pad]] * rows, np.zeros(rows, dtype=np.int64)
        steps = self.start(prompts, slots, length - 1, Sampling())
        next(steps)
        steps.close()

    def close(self) -> None:
        """Give caches, session and thread up; no call runs, and none comes any more."""
        self._is_closed = True
        while self._idle:
            self._do(self._idle.pop().release)
        self._worker.shutdown()
        del self._graph, self._top

    def _pad_prompts(self, tokens: Sequence[list[int]], slots: np.ndarray) -> Prompts:
        num, rows = len(tokens), 1 << (len(tokens) - 1).bit_length()
        lengths = np.ones(rows, dtype=np.int64)  # a row too many has one token of padding
        lengths[:num] = [len(own) for own in tokens]
        ids = np.full((rows, int(lengths.max())), self._pad, dtype=np.int64)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = own
        adapter_ids = np.zeros(rows, dtype=np.int64)
        adapter_ids[:num] = slots
        return Prompts(ids, lengths, adapter_ids, num)

    def _greedy(
        self, cache: Cache, step: Step, prompts: Prompts, steps: int
    ) -> Generator[np.ndarray, None, None]:
        """The next step runs while the caller looks at the tokens of the last one."""
        ahead = deque([self._worker.submit(self._read, cache, step, prompts)])
        try:
            for index in range(steps):
                if index + 1 < steps:
                    ahead.append(self._worker.submit(_advance, step, ahead[-1]))
                yield ahead[0].result()[: prompts.num]
                ahead.popleft()
        finally:
            # What runs now ends before other work on the cache begins. What waits shall not run: by
            # then the cache may be released.
            for one in ahead:
                one.cancel()

    def _sampled(
        self, cache: Cache, step: Step, prompts: Prompts, steps: int, sampling: Sampling
    ) -> Generator[np.ndarray, None, None]:
        random = np.random.default_rng(sampling.seed)
        candidates = sampling.num_candidates(self._graph.vocabulary)
        found = self._do(self._read_top, cache, step, prompts, candidates)
        top = self._do(step.top, self._top, candidates)
        ids = np.full(step.rows, self._pad, dtype=np.int64)
        own = ids[: prompts.num]
        for index in range(steps):
            if index > 0:
                found = self._do(_run, step, ids, top)
            values, tokens = (one[: len(own)] for one in found)
            own[:] = choose(sampling, values, tokens, random)
            yield own.copy()

    def _step(self, cache: Cache, rows: int, length: int) -> Step:
        while len(self._idle) > _IDLE:
            self._idle.popleft().release()
        is_new = not cache.has_step(rows, length)
        step = cache.step(rows, length)
        cache.clear()
        if is_new:
            verb = "captured" if self._graph.capture else "prepared"
            _LOG.info("%s the decode step of %d rows of up to %d tokens", verb, rows, length)
        return step

    def _read(self, cache: Cache, step: Step, prompts: Prompts) -> np.ndarray:
        """Fill the cache with the prompts; the likeliest token after each, int64 [rows]."""
        step.read(prompts, cache.logits([*prompts.ids.shape, self._graph.vocabulary]))
        return step.tokens()

    def _read_top(
        self, cache: Cache, step: Step, prompts: Prompts, candidates: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fill the cache with the prompts; what is likeliest after the last token of each."""
        shape = [*prompts.ids.shape, self._graph.vocabulary]
        logits = cache.logits(shape)
        step.read(prompts, logits)
        return self._top.bind(logits, shape, prompts.last[: prompts.num], candidates).run()

    def _do(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._worker.submit(work, *args, **kwargs).result()

    def _take(self) -> Cache:
        try:
            return self._idle.pop()
        except IndexError:
            return Cache(self._graph)


def _advance(step: Step, before: Future[np.ndarray]) -> np.ndarray:
    """The likeliest tokens after those of the step before, int64 [rows]."""
    before.result()  # of the same thread, so it is done: no step follows one that failed
    step.run()
    return step.tokens()


def _run(step: Step, ids: np.ndarray, top: BoundTopTokens) -> tuple[np.ndarray, np.ndarray]:
    step.put(ids)
    step.run()
    return top.run()
