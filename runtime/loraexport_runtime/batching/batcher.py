"""Requests from any thread -> batches of a session, each with its own adapter.

A batch is made when the session is idle: what came while the last one ran goes together, so that
batches grow with the load and a lone request waits for nothing.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Self

from ..errors import ClosedError, InputError, RequestTimeoutError
from ..sessions.layers import LayerSession
from ..sessions.model import ModelSession
from ..slots.admission import AdmissionQueue
from ..slots.batch import RowAdapters, read_rows, row_names, tenant_of
from ..slots.fair_queue import deadline_of
from ..slots.gate import Gate
from .gathering import BatchFuture, Request, fail, gather
from .joint import Joint, JointRows, JointSegments
from .stats import BatchCounts, BatcherStats

_LOG = logging.getLogger(__name__)
ROWS = 32
TOKENS = 16_384
MOST_QUEUED = 10_000
MOST_QUEUED_TOKENS = 10_000_000


class Batcher:
    """One model, or one layer, whose requests are run together.

    with load_model("artifacts/minilm") as session, Batcher(session) as batcher:
        future = batcher.submit({"input_ids": ids, "attention_mask": mask}, "pydoc")
        future.result()["sentence_embedding"]  # or: await batcher.asubmit(…)

    Requests are taken by turns of tenants, so that one who floods delays himself alone; those of
    like length go together; a batch names at most as many adapters as there are slots, and whoever
    has to wait for that is not overtaken for ever. What a request gives is what it gives alone, but
    for the rounding of another batch's size. A batch that fails is halved until the request that
    fails is alone: only that one gets the error.

    Threads: every method may be called from any thread. The batcher's own, one for each worker, run
    the session, which others may use at the same time.
    """

    def __init__(
        self,
        session: ModelSession | LayerSession,
        *,
        most_rows: int = ROWS,
        most_tokens: int = TOKENS,
        delay: float = 0.0,
        workers: int = 1,
        most_queued: int = MOST_QUEUED,
        most_queued_tokens: int = MOST_QUEUED_TOKENS,
    ) -> None:
        """
        Args:
            session: of a whole model, or a layer of a session of layers.
            most_rows, most_tokens: of a batch, its padding counted; a longer request runs alone.
            delay: seconds to wait for more requests, once one has come to an idle batcher.
            workers: batches that run at the same time. On a CPU two, each with half of the cores
                (`threads` of `load`), do more than one after the other with all of them.
            most_queued, most_queued_tokens: what may wait; more is refused.

        Raises:
            InputError: a value is not what it may be.
        """
        counts = {"most_rows": most_rows, "most_tokens": most_tokens, "workers": workers}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}; expected a whole number from 1 on")
        if not isinstance(delay, int | float) or not 0 <= delay < 60:
            raise InputError(f"delay is {delay!r}; expected seconds, from 0 to less than 60")
        self._joint: Joint = (
            JointRows(session) if isinstance(session, ModelSession) else JointSegments(session)
        )
        self._slots = session.host.slots
        self._most_rows, self._most_tokens, self._delay = most_rows, most_tokens, delay
        self._queue = AdmissionQueue[Request](most_queued, most_queued_tokens)
        self._counts = BatchCounts()
        self._turn = threading.Lock()
        """Held by the one thread that waits for requests, and makes a batch of them."""
        self._noting = threading.Lock()
        """Of the counts."""
        self._news = threading.Event()
        self._gate = Gate("the batcher", "make another one")
        """Around who puts, so that nothing is put behind the last look of a thread that ends."""
        self._is_ending = self._cancels = False
        self._threads = [
            threading.Thread(target=self._work, name=f"loraexport-batch-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        inputs: Any,
        adapter: RowAdapters = None,
        *,
        tenant: str | None = None,
        timeout: float | None = None,
    ) -> BatchFuture:
        """Let one request wait for its batch.

        Args:
            inputs: of a model one row of each input, without the batch's dimension, e.g.
                `input_ids int64 [n]`; of a layer `x [n, in]`, or ids [n]. They are copied.
            adapter: a loaded adapter's name, None for the base, or (export.blend) a blend.
            tenant: whose turn it takes; default: the adapter.
            timeout: seconds until its batch has to begin.

        Returns:
            A future of the model's outputs by name, without the batch's dimension and the padding,
            or of the layer's y [n, out]; or of the error: RequestTimeoutError, and whatever `run`
            raises. `cancel()` takes it out of the queue; `began` is when its batch began.

        Raises:
            InputError: the inputs, the adapter or the timeout are not what they may be.
            UnknownAdapterError: the adapter is not loaded.
            QueueFullError: as many wait as may.
            ClosedError: the batcher, or the session, is closed.
        """
        with self._gate.entry(), self._gate:
            (adapter,) = read_rows([adapter], 1)
            names = frozenset(row_names([adapter]))
            if len(names) > self._joint.num_slots:
                raise InputError(
                    f"the blend has {len(names)} adapters, and the artifact {self._joint.num_slots}"
                    " slots; name fewer, or build with more slots"
                )
            part = self._joint.read(inputs, adapter)
            deadline = deadline_of(timeout)
            for name in names:
                self._slots.read(name)
            request = Request(part, names, BatchFuture(), deadline)
            tenant = tenant_of(names, tenant)
            self._queue.put([request], part.length, tenant, (names, part.length))
            request.future.add_done_callback(self._on_done)
            if not self._news.is_set():  # once it is cleared, what was put by then is seen
                self._news.set()
            return request.future

    async def asubmit(
        self,
        inputs: Any,
        adapter: RowAdapters = None,
        *,
        tenant: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """As `submit`, awaited: a task that is cancelled takes its request out of the queue."""
        return await asyncio.wrap_future(
            self.submit(inputs, adapter, tenant=tenant, timeout=timeout)
        )

    def require_room(
        self,
        adapter: RowAdapters = None,
        tenant: str | None = None,
        requests: int = 1,
        tokens: int = 1,
    ) -> None:
        """Refuse, before inputs are made, what `submit` would refuse.

        Args:
            adapter: as of `submit`.
            tenant: as of `submit`.
            requests: so many of them.
            tokens: of all together, as far as they are known.

        Raises:
            QueueFullError: as many wait as may.
        """
        (adapter,) = read_rows([adapter], 1)
        self._queue.require_room(requests, tokens, tenant_of(row_names([adapter]), tenant))

    def stats(self) -> BatcherStats:
        """What was run so far, and what waits; also once it is closed.

        Raises ClosedError: this is the child of a fork.
        """
        self._gate.check_process()
        queued, tokens = self._queue.sizes()
        return BatcherStats(queued=queued, queued_tokens=tokens, **vars(self._counts))

    def close(self, *, cancel_queued: bool = False) -> None:
        """Refuse new requests, run those that wait, and end the thread; the session stays open.

        Args:
            cancel_queued: those that wait get ClosedError instead.
        """
        self._cancels |= cancel_queued
        self._gate.close(self._end)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        """Nobody puts any more."""
        self._is_ending = True
        self._news.set()

    # The threads

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._run(batch)
        except BaseException as fault:
            _LOG.exception("a thread that makes batches has ended")
            self._gate.close(self._end)
            with self._turn:
                for request in self._queue.remove(lambda _: True):
                    fail(request, fault)
            raise

    def _next_batch(self) -> list[Request]:
        """Wait for a batch; there is none once the batcher has ended."""
        with self._turn:
            while True:
                is_ending = self._is_ending  # read first: nothing is put once it is set
                is_idle = not self._queue.sizes()[0]
                if is_ending and is_idle:
                    return []
                self._news.wait(None if is_idle else 0)
                self._news.clear()
                if is_idle and self._delay and not self._is_ending:
                    time.sleep(self._delay)
                self._drop()
                if batch := gather(
                    self._queue, self._joint, self._counts, self._most_rows, self._most_tokens
                ):
                    return batch

    def _drop(self) -> None:
        """Who was cancelled, and who waited too long; all of them where the batcher says so."""
        if self._cancels:
            for request in self._queue.remove(lambda _: True):
                fail(request, ClosedError("the batcher was closed before the request was run"))
        now = time.monotonic()

        def is_over(request: Request) -> bool:
            is_late = request.deadline is not None and request.deadline.end <= now
            return request.future.cancelled() or is_late

        for request in self._queue.remove(is_over):
            if request.future.cancelled():
                self._counts.cancelled += 1
            elif request.deadline is not None:
                self._counts.late += 1
                late = RequestTimeoutError(
                    f"the request was not begun within {request.deadline.seconds:g} seconds; wait"
                    " longer, or send less at once"
                )
                fail(request, late)

    def _run(self, batch: Sequence[Request]) -> None:
        parts = [request.part for request in batch]
        lengths = [part.length for part in parts]
        start = time.monotonic()
        for request in batch:
            request.future.began = request.future.began or start
        try:
            results = self._joint.run(parts)
        except BaseException as error:
            if len(batch) > 1 and isinstance(error, Exception):
                _LOG.info("a batch of %d failed, and is halved: %s", len(batch), error)
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self._run(half)
                return
            with self._noting:
                self._counts.failed += len(batch)
            for request in batch:
                request.future.set_exception(error)
            return
        seconds = time.monotonic() - start
        padded = self._joint.padded(lengths)
        with self._noting:
            self._joint.note(padded, seconds)
            self._counts.note_run(len(batch), sum(lengths), padded, seconds)
        for request, result in zip(batch, results, strict=True):
            request.future.set_result(result)

    def _on_done(self, future: Future[Any]) -> None:
        if future.cancelled():
            self._news.set()  # so that it does not count in the queue any longer
