"""A decoder's graph in a plain session, driven step by step, its steps captured as CUDA graphs.

onnxruntime-genai cannot capture a batch: it would read the prompts with a past, and its attention
takes one token of a row then. Here the prompts are read without one and uncaptured, over the very
memory that the captured steps use.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from . import devices
from .errors import ProviderError
from .genai_config import read_genai_config
from .kv_cache import Cache, Step, read_graph
from .sampling import Sampling, choose
from .top_tokens import BoundTopTokens, TopTokens

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

    def __init__(self, folder: Path, pad: int, provider: str, capture: bool) -> None:
        """Open the graph of a folder with a genai_config.json.

        Args:
            provider: "cpu" or "cuda".
            capture: the steps as CUDA graphs; else they run over the same memory as they are.

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
        plain = devices.normalise_providers([provider])
        device = devices.session_device(plain[0])
        devices.require_device(device)
        pairs = devices.with_cuda_graphs(plain) if capture else plain
        try:
            session = devices.open_session(folder / decoder["filename"], pairs, {}, None)
        except ProviderError as error:
            if not capture:
                raise
            raise ProviderError(
                f"{error}. If its steps cannot be captured, pass cuda_graphs=False"
            ) from error
        self._graph = read_graph(session, decoder, device, capture)
        graph = self._graph
        self._top = TopTokens(graph.logits_dtype, graph.vocabulary, plain)
        self._pad = pad
        self._context = int(config["model"]["context_length"])
        self._idle: deque[Cache] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loraexport-decode")

    def start(
        self, tokens: Sequence[list[int]], slots: np.ndarray, steps: int, sampling: Sampling
    ) -> Generator[np.ndarray, None, None]:
        """The next token of every row at a time, int64 [batch]: `steps` times, past any end."""
        num_rows = 1 << (len(tokens) - 1).bit_length()
        lengths = np.ones(num_rows, dtype=np.int64)  # a row too many has one token of padding
        lengths[: len(tokens)] = [len(own) for own in tokens]
        length = min(-(-(int(lengths.max()) + steps) // _LENGTHS) * _LENGTHS, self._context)
        random = np.random.default_rng(sampling.seed)
        candidates = sampling.num_candidates(self._graph.vocabulary)
        cache = self._take()
        try:
            step = self._do(self._step, cache, num_rows, length)
            found = self._do(self._read, cache, step, tokens, lengths, slots, candidates)
            top = self._do(step.top, self._top, candidates)
            ids = np.full(num_rows, self._pad, dtype=np.int64)
            own = ids[: len(tokens)]
            for index in range(steps):
                if index > 0:
                    lengths[: len(own)] += 1
                    found = self._do(_run, step, ids, lengths, top)
                values, candidate_tokens = (one[: len(own)] for one in found)
                own[:] = choose(sampling, values, candidate_tokens, random)
                yield own.copy()
        finally:
            # Maybe in another thread, or while Python collects garbage: so without a lock.
            self._idle.append(cache)

    def warm_up(self, rows: int, length: int) -> None:
        """Take the memory and capture the step of batches of this size ahead of the first one.

        Args:
            length: of the longest prompt and the new tokens together.
        """
        prompts, slots = [[self._pad]] * rows, np.zeros(rows, dtype=np.int64)
        taken = self.start(prompts, slots, length - 1, Sampling())
        for _ in zip(range(2), taken, strict=False):
            pass
        taken.close()

    def _step(self, cache: Cache, rows: int, length: int) -> Step:
        while len(self._idle) > _IDLE:
            self._idle.popleft().release()
        step = cache.step(rows, length)
        cache.clear()
        return step

    def _read(
        self,
        cache: Cache,
        step: Step,
        tokens: Sequence[list[int]],
        lengths: np.ndarray,
        slots: np.ndarray,
        candidates: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fill the cache with the prompts; what is likeliest after the last token of each."""
        ids = np.full((step.rows, int(lengths.max())), self._pad, dtype=np.int64)
        adapter_ids = np.zeros(step.rows, dtype=np.int64)
        adapter_ids[: len(tokens)] = slots
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = own
        shape = [*ids.shape, self._graph.vocabulary]
        logits = cache.logits(shape)
        step.read(ids, lengths, adapter_ids, logits)
        last = (np.arange(step.rows) * ids.shape[1] + lengths - 1)[: len(tokens)]
        return self._top.bind(logits, shape, last, candidates).run()

    def _do(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._worker.submit(work, *args, **kwargs).result()

    def _take(self) -> Cache:
        try:
            return self._idle.pop()
        except IndexError:
            return Cache(self._graph)


def _run(
    step: Step, ids: np.ndarray, lengths: np.ndarray, top: BoundTopTokens
) -> tuple[np.ndarray, np.ndarray]:
    step.run(ids, lengths)
    return top.run()
