"""A request that was submitted, seen by whoever waits for its tokens: a thread, or asyncio."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import LoraexportError
from ..slots.fair_queue import deadline_of

FinishReason = Literal["stop", "length", "cancelled"]
"""A token or a text that ends it, `max_tokens`, or `cancel`."""
Logprobs = tuple[tuple[int, float], ...]
"""(token, logarithm of its probability), from the likeliest down."""


@dataclass(frozen=True)
class GeneratedToken:
    """One token of one answer, as it comes."""

    answer: int
    token: int
    logprob: float | None = None
    """Of its probability, before penalties and temperature; None unless `logprobs` asks for it."""
    likeliest: Logprobs = ()


@dataclass(frozen=True)
class GeneratedAnswer:
    """The tokens of an answer, without the one that ended it."""

    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class PromptToken:
    """A token of the prompt, and what the model thought of it."""

    token: int
    logprob: float
    likeliest: Logprobs


@dataclass(frozen=True)
class Generation:
    """All that a request gave."""

    answers: tuple[GeneratedAnswer, ...]
    prompt_tokens: int
    reused_tokens: int
    """So many of the prompt's were in a row's cache already; of the first answer."""
    prompt_logprobs: tuple[PromptToken, ...]
    """From the prompt's second token on; empty unless `prompt_logprobs` asks for them."""


class GenerationHandle:
    """A request on its way. Every method may be called from any thread.

    Iterating gives its tokens as they come, those of several answers in turn, in a thread or with
    `async for`; more than one may do so, and each sees all of them. `await handle` gives what
    `result` does. In the child of a fork, to which no token comes, all of it is a ClosedError.
    """

    def __init__(
        self,
        num_answers: int,
        num_prompt: int,
        wake: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        """
        Args:
            wake: tells the engine to look at it.
            check: raises where the engine's thread is not.
        """
        self._changed = threading.Condition()
        self._tokens: list[GeneratedToken] = []
        self._reasons: list[FinishReason | None] = [None] * num_answers
        self._num_prompt = num_prompt
        self._num_reused = 0
        self.began: float | None = None
        """When the first answer's prompt began to be read, by `time.monotonic`; None: it waits."""
        self._prompt: list[PromptToken] = []
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._wake = wake
        self._check = check
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_done(self) -> bool:
        """Whether no token comes any more."""
        return self._error is not None or None not in self._reasons

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self) -> None:
        """Give it up: its answers end as they are, `cancelled`, before the next step."""
        self._check()
        self._is_cancelled = True
        self._wake()

    @property
    def reasons(self) -> tuple[FinishReason | None, ...]:
        """Why each answer has ended; None of one that goes on.

        What `fresh` gives after it holds all tokens of those that have ended.
        """
        with self._changed:
            return tuple(self._reasons)

    def result(self, timeout: float | None = None) -> Generation:
        """All that it gave, once it is done.

        Args:
            timeout: seconds to wait; the request itself goes on.

        Raises:
            LoraexportError: what ended it.
            TimeoutError: it is not done yet.
        """
        self._check()
        deadline = deadline_of(timeout)
        with self._changed:
            remaining = None if deadline is None else deadline.remaining()
            if not self._changed.wait_for(lambda: self.is_done, remaining):
                raise TimeoutError(f"the request is not done after {timeout} seconds; it goes on")
        return self._generation()

    def __iter__(self) -> Iterator[GeneratedToken]:
        at = 0
        while True:
            fresh = self._next(at)
            if not fresh:
                self._raise()
                return
            yield from fresh
            at += len(fresh)

    def _next(self, at: int) -> list[GeneratedToken]:
        """The tokens from one on, once there is one; empty: none comes any more."""
        self._check()
        with self._changed:
            self._changed.wait_for(lambda: self.is_done or len(self._tokens) > at)
            return self._tokens[at:]

    async def __aiter__(self) -> AsyncIterator[GeneratedToken]:
        at, loop, changed = 0, asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        self.listen(listener)
        try:
            while True:
                changed.clear()
                fresh, is_done = self._fresh(at)
                for token in fresh:
                    yield token
                at += len(fresh)
                if is_done and not fresh:
                    self._raise()
                    return
                if not fresh:
                    await changed.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call it now, and then whenever something has come; it must not wait."""
        self._check()
        with self._changed:
            self._listeners.append(listener)
            listener()

    def fresh(self, at: int) -> tuple[list[GeneratedToken], bool]:
        """The tokens from one on that are there, and whether they are the last.

        Raises what ended the request, once its tokens have been given.
        """
        fresh, is_done = self._fresh(at)
        if is_done and not fresh:
            self._raise()
        return fresh, is_done

    def _fresh(self, at: int) -> tuple[list[GeneratedToken], bool]:
        self._check()
        with self._changed:
            return self._tokens[at:], self.is_done

    def __await__(self) -> Generator[Any, None, Generation]:
        return self._drain().__await__()

    async def _drain(self) -> Generation:
        async for _ in self:
            pass
        return self._generation()

    def _generation(self) -> Generation:
        self._raise()
        answers = []
        for index, reason in enumerate(self._reasons):
            assert reason is not None, "it is done"
            tokens = tuple(token for token in self._tokens if token.answer == index)
            answers.append(GeneratedAnswer(tokens, reason))
        return Generation(tuple(answers), self._num_prompt, self._num_reused, tuple(self._prompt))

    def _raise(self) -> None:
        error = self._error
        if error is None:
            return
        if isinstance(error, LoraexportError):
            raise type(error)(str(error)) from error  # each caller has a traceback of its own
        raise error

    # What follows is the engine's.

    def note_prompt(self, reused: int) -> None:
        """The prompt is being read; so many tokens of it need not be."""
        self._num_reused, self.began = reused, time.monotonic()

    def push_prompt(self, tokens: list[PromptToken]) -> None:
        """More of the prompt has been read."""
        self._prompt += tokens

    def push(self, token: GeneratedToken) -> None:
        """One more token."""
        with self._changed:
            self._tokens.append(token)
            self._notify()

    def finish(self, answer: int, reason: FinishReason) -> None:
        """An answer has ended."""
        with self._changed:
            self._reasons[answer] = reason
            self._notify()

    def fail(self, error: BaseException) -> None:
        """No token comes any more, and this is why; the first reason stays."""
        with self._changed:
            if not self.is_done:
                self._error = error
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()
