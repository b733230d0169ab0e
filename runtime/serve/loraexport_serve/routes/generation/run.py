"""A request's answers on their way: queued together, read as they come, cancelled together."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from loraexport_runtime import (
    GeneratedToken,
    GenerationHandle,
    GenerationRequest,
    InputError,
    ProviderError,
    RequestTimeoutError,
)
from loraexport_runtime.generation.text.stream import TextStream

from ...errors import unsupported
from ...hosts.decoder import DecoderHost
from ...metrics.meter import Pace
from ..endpoint import Call
from .body import of_field

Reason = Literal["stop", "length"]
_PAUSE = 0.02
"""Seconds between two looks at what has come, but for the first and the last one."""


@dataclass
class News:
    """What has come of one answer since the last time."""

    choice: int
    """The answers to the first prompt are the first ones."""
    text: str
    tokens: list[GeneratedToken]
    reason: Reason | None
    """Why it has ended; then nothing more comes."""


class Run:
    """The answers to the prompts of one HTTP request. The loop's thread uses it."""

    def __init__(
        self, call: Call[Any], host: DecoderHost, requests: Sequence[GenerationRequest]
    ) -> None:
        self._call, self._host, self._requests = call, host, requests
        self._handles: list[GenerationHandle] = []
        self._submitted = 0.0
        self._is_cancelled = self._has_failed = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._is_told = False
        """The loop knows that something has come since its last look."""
        self._next_look = 0.0
        self._late: RequestTimeoutError | None = None
        self._pending: list[News] = []
        tokenizer = host.tokenizer
        self._texts = [
            TextStream(tokenizer, request.stop, request.min_tokens)
            for request in requests
            for _ in range(request.n)
        ]
        self._reasons: list[Reason | None] = [None] * len(self._texts)
        self._at = [0] * len(requests)
        self._pace = Pace(call.service.meter, host.name, call.start, len(self._texts))

    @property
    def num_answers(self) -> int:
        return len(self._texts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.tokens) for request in self._requests)

    @property
    def completion_tokens(self) -> int:
        return sum(self._at)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, those that lay in rows; once all is done."""
        return sum(handle.result().reused_tokens for handle in self._handles)

    async def start(self) -> None:
        """Queue all, and wait until something comes: what goes wrong till then has its status.

        Raises:
            ApiError, LoraexportError: they are not queued, or were not begun in time.
        """
        call, host = self._call, self._host
        call.stack.callback(self.cancel)
        assert call.target is not None, "the host was resolved"
        await host.prepare(call.target.names)
        try:
            if any(request.grammar is not None for request in self._requests):
                await call.service.compile(self._submit)
            else:
                self._submit()
        except InputError as error:
            raise of_field(error, call.body) from error
        except ProviderError as error:
            raise unsupported("response_format", str(error)) from error
        for handle in self._handles:
            handle.listen(partial(self._tell, handle))
        timeout = call.service.settings.queue_timeout
        timer = self._loop.call_later(timeout, self._expire) if timeout else None
        try:
            self._pending = await self._pull()
        finally:
            if timer is not None:
                timer.cancel()

    async def news(self) -> AsyncIterator[list[News]]:
        """What has come, until all answers have ended.

        Raises:
            LoraexportError: what ended one of them; the others are given up.
        """
        while True:
            fresh, self._pending = self._pending, []
            yield fresh
            if None not in self._reasons:
                break
            self._pending = await self._pull()
        self._end("stop")

    def cancel(self) -> None:
        """Give up what is not done yet."""
        self._is_cancelled = True
        if self._submitted and not self._has_failed:
            self._end("abort")
        for handle in self._handles:
            if not handle.is_done:
                handle.cancel()

    def _end(self, other: str) -> None:
        """All is over. Args: other: why those answers have ended that did not by themselves."""
        reasons = [reason or other for reason in self._reasons]
        self._pace.end(reasons)
        outcome = self._call.outcome
        if not outcome.reasons:
            outcome.waited, outcome.reasons = self._pace.waited, tuple(reasons)
            outcome.prompt_tokens = self.prompt_tokens
            outcome.generated_tokens = self.completion_tokens

    def _submit(self) -> None:
        """In any thread, which goes on when the request is cancelled."""
        self._handles = self._host.engine.submit_all(self._requests)
        self._submitted = time.monotonic()
        if self._is_cancelled:
            self.cancel()

    def _tell(self, handle: GenerationHandle) -> None:
        """In the engine's thread: something has come. The loop is woken once for all of it."""
        if self._loop.is_closed():
            return
        if handle.is_done:
            self._loop.call_soon_threadsafe(self._changed.set)
        elif not self._is_told:
            self._is_told = True
            self._loop.call_soon_threadsafe(self._schedule)

    def _schedule(self) -> None:
        """Look at it, not too soon after the last time."""
        if self._loop.time() >= self._next_look:
            self._changed.set()
        else:
            self._loop.call_at(self._next_look, self._changed.set)

    def _expire(self) -> None:
        if all(handle.began is None and not handle.is_done for handle in self._handles):
            seconds = self._call.service.settings.queue_timeout
            self._late = RequestTimeoutError(f"the request waited {seconds:g} seconds in the queue")
            self._changed.set()

    async def _pull(self) -> list[News]:
        """What has come of all answers, once something has."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._next_look = self._loop.time() + _PAUSE
            self._is_told = False  # ahead of the look, so that nothing is missed
            fresh: list[News] = []
            try:
                if self._late is not None:
                    raise self._late
                for row in range(len(self._handles)):
                    fresh += self._look(row)
            except BaseException as error:
                self._has_failed = True
                self.cancel()
                if isinstance(error, InputError):
                    raise of_field(error, self._call.body) from error
                raise
            if fresh:
                return fresh

    def _look(self, row: int) -> list[News]:
        """What has come of the answers to one prompt."""
        handle, num = self._handles[row], self._requests[row].n
        first = row * num
        if None not in self._reasons[first : first + num]:
            return []
        reasons = handle.reasons  # ahead of the tokens, of which it then has all
        tokens, is_done = handle.fresh(self._at[row])
        self._at[row] += len(tokens)
        if is_done and None in reasons:
            self._changed.set()  # what ended it is told by the next look, and nobody calls for that
        if handle.began is not None:
            self._pace.begin(handle.began - self._submitted, self.prompt_tokens)
        found = []
        for index in range(num):
            own = [token for token in tokens if token.answer == index] if num > 1 else tokens
            if one := self._news(first + index, own, reasons[index]):
                found.append(one)
        return found

    def _news(self, choice: int, tokens: list[GeneratedToken], reason: str | None) -> News | None:
        if self._reasons[choice] is not None or not (tokens or reason):
            return None
        self._pace.tokens(choice, len(tokens))
        stream = self._texts[choice]
        text = "".join(stream.push(token.token) for token in tokens)
        ended: Reason | None = None
        if reason is not None:
            text += stream.finish()
            is_stop = reason == "stop" or stream.stopped is not None
            ended = self._reasons[choice] = "stop" if is_stop else "length"
        return News(choice, text, tokens, ended)


async def start(call: Call[Any], host: DecoderHost, requests: Sequence[GenerationRequest]) -> Run:
    """A run that has begun; it is cancelled once nobody waits for its request. See Run.start."""
    run = Run(call, host, requests)
    await run.start()
    return run
