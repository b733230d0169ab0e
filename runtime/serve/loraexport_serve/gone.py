"""Work for a client, which ends with it."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """What the answer is; where the client goes first it is cancelled. Raises ClientGoneError."""
    here = asyncio.current_task()
    assert here is not None, "an endpoint is run by a task"
    is_gone = False

    def end(_: "asyncio.Task[None]") -> None:
        nonlocal is_gone
        is_gone = True
        here.cancel()

    waiting = asyncio.ensure_future(_wait_gone(request))
    waiting.add_done_callback(end)
    try:
        given = await answer
        if waiting.done():  # what was sent since then went nowhere
            raise ClientGoneError
        return given
    except asyncio.CancelledError:
        if not is_gone:
            raise
        here.uncancel()
        raise ClientGoneError from None
    finally:
        waiting.remove_done_callback(end)
        waiting.cancel()


async def _wait_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
