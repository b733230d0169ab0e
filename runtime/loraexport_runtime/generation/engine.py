"""A decoder's engine: requests come from any thread, join and leave the running batch."""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..contract.files import resolve
from ..contract.genai_config import end_tokens, read_genai_config
from ..contract.kinds import Decoder
from ..contract.listed import ListedFiles
from ..contract.manifest import Manifest
from ..device import providers as devices
from ..device.captures import using
from ..device.kernels import Kernels, choose_kernels
from ..device.ort_session import require_device
from ..errors import ClosedError, InputError
from ..slots.admission import AdmissionQueue
from ..slots.batch import row_names, tenant_of
from ..slots.gate import Gate
from ..slots.host import AdapterHost
from ..slots.hosted import HostsAdapters
from ..slots.pool import Slots
from .grammar import Grammar, GrammarReader
from .handle import GenerationHandle
from .loop.jobs import Answer, Job, StopText
from .loop.worker import Worker
from .request import GenerationRequest, checked
from .sampling import Allowed, Sampler
from .stats import GenerationStats
from .steps.files import StepFiles
from .steps.runner import Runner

_LOG = logging.getLogger(__name__)
QUOTA = 512
"""Tokens of a prompt between two groups of steps, by default."""
MOST_QUEUED = 10_000
MOST_QUEUED_TOKENS = 100_000_000


class RequestEngine:
    """A thread that generates for all requests at once, over a runner's rows and some slots.

    Threads: every method may be called from any thread, at the same time as any other.
    """

    def __init__(
        self,
        folder: Path,
        runner: Runner,
        slots: Slots,
        ends: frozenset[int],
        *,
        quota: int = QUOTA,
        most_queued: int = MOST_QUEUED,
        most_queued_tokens: int = MOST_QUEUED_TOKENS,
        open_text: Callable[[tuple[str, ...], int], StopText] | None = None,
        open_grammar: Callable[[Grammar], Allowed] | None = None,
    ) -> None:
        """
        Args:
            folder: for the texts of errors.
            ends: the tokens that end a text.
            quota: tokens of a prompt that are read between two groups of steps.
            most_queued, most_queued_tokens: what may wait for a row.
            open_text: text of an answer that ends where it holds one of these strings, from so
                many tokens on; None: requests have no `stop`.
            open_grammar: what a grammar allows; None: requests have none.
        """
        if not isinstance(quota, int) or isinstance(quota, bool) or quota < 2:
            raise InputError(f"quota is {quota!r}; expected a number of tokens from 2 on")
        self.folder, self.ends = folder, ends
        self.rows, self.length, self.vocabulary = runner.rows, runner.length, runner.vocabulary
        self._slots, self._most_weight = slots, runner.most_weight
        self._kernels = runner.kernels.said
        self._open_text, self._open_grammar = open_text, open_grammar
        self._queue = AdmissionQueue[Answer](most_queued, most_queued_tokens)
        subject, how = f"the generator of {folder}", "open the artifact again"
        self._gate = Gate(subject, how)
        closed = f"{subject} is closed; {how}"
        self._worker = Worker(runner, slots, self._queue, quota, closed)
        # The thread knows the worker alone, so that an engine that is dropped ends it.
        self._thread = threading.Thread(
            target=self._worker.run, name="loraexport-generate", daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._gate, self._worker, self._thread)

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Let a request wait for a row. An adapter that nobody has read yet is read here.

        Raises:
            InputError: a value of it is not what it may be.
            ProviderError: it has a grammar, and llguidance is not installed.
            QueueFullError: as many wait as may.
            UnknownAdapterError: its adapter is not loaded.
            SlotsExceededError: every slot is kept for another pinned adapter.
            ClosedError: the engine is closed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[GenerationRequest]) -> list[GenerationHandle]:
        """The same for several, which come at the same time: all of them wait, or none."""
        with self._gate.entry(), self._gate:
            jobs = [self._make_job(request) for request in requests]
            grammars: dict[Grammar | None, Allowed] = {}
            for job in jobs:
                grammar = job.request.grammar
                if grammar is not None and self._open_grammar and grammar not in grammars:
                    grammars[grammar] = self._open_grammar(grammar)
            try:
                for job in jobs:
                    self._put(job, grammars.get(job.request.grammar))
            except BaseException:
                for job in jobs:
                    job.handle.cancel()
                raise
            finally:
                self._worker.wake()
            self._require_thread()  # after that: what is queued is refused when it ends
            return [job.handle for job in jobs]

    def warm_up(self, rows: int | None = None) -> None:
        """Prepare the steps of up to so many rows, which captures them with CUDA graphs.

        Args:
            rows: default: all of the engine's.

        Raises InputError, ClosedError.
        """
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise InputError(f"rows is {rows!r}; expected a whole number from 1 on")
        with self._gate.entry(), self._gate:
            self._require_thread()
            self._worker.warm_up(self.rows if rows is None else min(rows, self.rows))

    def stats(self) -> GenerationStats:
        """What the engine has done so far, and does now; also once it is closed.

        Raises ClosedError: this is the child of a fork.
        """
        self._gate.check_process()
        counts, slots = self._worker.counts, self._slots.counts()
        queued, tokens = self._queue.sizes()
        return GenerationStats(
            rows=self.rows,
            length=self.length,
            running=self._worker.num_running,
            queued=queued,
            queued_tokens=tokens,
            **asdict(counts),
            slots_held=slots.slots_held,
            pages=slots.pages,
            evictions=slots.evictions,
            kernels=self._kernels,
        )

    def close(self) -> None:
        """Refuse what is not done, and give thread and memory up.

        Handles that are open end with ClosedError, and so does every later call but `stats` and
        this one. `with` closes it too.
        """
        self._gate.close(self._give_up)

    def __enter__(self) -> Self:
        self._gate.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_up(self) -> None:
        # Once more, where an interrupt ended the wait for it.
        _end(self._gate, self._worker, self._thread)
        self._end.detach()
        self._release()
        _LOG.info("closed %s", self.folder)

    def _release(self) -> None:
        """The thread has ended; nobody runs any more."""

    def _make_job(self, request: GenerationRequest) -> Job:
        request = checked(request, self.vocabulary, self.length, self._most_weight)
        if request.stop and self._open_text is None:
            raise InputError("stop: this engine knows no texts; give stop_token_ids")
        if request.grammar is not None and self._open_grammar is None:
            raise InputError("grammar: this engine knows no texts; leave it out")
        self._slots.read(request.adapter)
        prompt = np.array(request.tokens, dtype=np.int64)
        wake, check = self._worker.on_cancel, self._gate.check_process
        handle = GenerationHandle(request.n, len(prompt), wake, check)
        end = None if request.timeout is None else time.monotonic() + request.timeout
        return Job(request, prompt, handle, end, request.n)

    def _put(self, job: Job, allowed: Allowed | None) -> None:
        request = job.request
        names = tuple(sorted({*row_names([request.adapter])}))
        tenant = tenant_of(names, request.tenant)
        answers = [
            self._answer(job, index, None if allowed is None else allowed.copy())
            for index in range(request.n)
        ]
        cost = len(job.prompt) + request.max_tokens
        self._queue.put(answers, cost, tenant, resource=names)

    def _answer(self, job: Job, index: int, allowed: Allowed | None) -> Answer:
        request = job.request
        own = frozenset[int]() if request.ignore_eos else self.ends
        ends = own.union(request.stop_token_ids)
        sampler = Sampler(request, job.prompt, index, ends, request.min_tokens, allowed)
        text = None
        if self._open_text and request.stop:
            text = self._open_text(tuple(request.stop), request.min_tokens)
        return Answer(job, index, sampler, ends, text)

    def _require_thread(self) -> None:
        if (fault := self._worker.fault) is not None:
            raise ClosedError(
                f"{self.folder}: the thread that generates has ended: {fault}; open the artifact"
                " again"
            ) from fault


class GenerationEngine(HostsAdapters, RequestEngine):
    """A decoder's session, its adapters, and a thread that generates for all requests at once.

    handle = engine.submit(GenerationRequest(tokens=[…], adapter="sql", max_tokens=64))
    for token in handle: …                  # or `async for`, or handle.result()

    An answer gets a row of a cache of fixed size, from its prompt to its last token, and keeps its
    adapter's slot as long: a load that replaces the adapter goes into another slot, so that the
    answer ends as it began. What it gives does not depend on who else is there.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        decoder: Decoder,
        providers: list[tuple[str, dict[str, Any]]],
        *,
        capture: bool = False,
        kernels: Kernels = "auto",
        rows: int | None = None,
        length: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            capture: the steps as CUDA graphs, each when it is first needed, or by `warm_up`.
            kernels: as of `load`.
            rows: answers at the same time; default: 8 on a CPU and 32 on CUDA, or as many as half
                of the free memory holds.
            length: tokens of a prompt and its answer; default: the model's context, or less.
            options: of a RequestEngine.
        """
        self.manifest = manifest
        where = resolve(folder, decoder.folder)
        ends = frozenset(end_tokens(read_genai_config(where)["model"]))
        device = devices.session_device(providers[0])
        for provider in providers:
            require_device(devices.session_device(provider))
        steps = None
        if decoder.steps is not None:
            steps = StepFiles(*(resolve(folder, path) for path in decoder.steps.files()))
        choice = choose_kernels(kernels, manifest, providers)
        sizes = rows, length, decoder.reread_length, steps
        every = (stack.name for layer in manifest.layers for stack in layer.stacks)
        with using(device):
            self._host = AdapterHost(folder, manifest, device)
            stacks = {name: self._host.stack(name) for name in every}
            runner = Runner(where, providers, capture, stacks, *sizes, kernels=choice)
        files = ListedFiles(folder, manifest.files)
        grammars = GrammarReader(files, decoder.folder, runner.vocabulary, ends)
        super().__init__(
            folder, runner, self._host.slots, ends, open_grammar=grammars.open, **options
        )

    def _release(self) -> None:
        self._host.close()


def _end(gate: Gate, worker: Worker, thread: threading.Thread) -> None:
    if gate.is_forked:
        return  # the thread is the parent's, and so may the locks be
    worker.stop()
    if thread is not threading.current_thread():
        thread.join()
