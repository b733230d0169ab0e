"""Server-sent events: the chunks of an answer as they come, an error as the last one."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...gone import ClientGoneError, unless_gone
from ..endpoint import Call

_ENCODER = msgspec.json.Encoder()
_SEPARATORS = [(mark.encode(), b"\\u%04x" % ord(mark)) for mark in "\u0085\u2028\u2029"]
"""A line ends there for clients that split what is decoded already, such as httpx; with what JSON
has for them."""
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Events(Response):
    """What is sent of chunks, those that are there together at once, and `[DONE]` in the end."""

    media_type = "text/event-stream"

    def __init__(self, call: Call[Any], chunks: AsyncGenerator[list[Any], None]) -> None:
        """`chunks`: values for JSON; an error of theirs is the last event, without `[DONE]`."""
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]  # nobody knows yet
        self._call, self._chunks = call, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientGoneError."""
        await unless_gone(self._call.request, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async with aclosing(self._bodies()) as bodies:
                async for body in bodies:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as error:
            raise ClientGoneError from error

    async def _bodies(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._chunks):
                async for chunks in self._chunks:
                    if chunks:
                        yield b"".join(map(_event, chunks))
        except Exception as error:
            yield _event(self._call.refuse(error).body())
        else:
            yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    text = _ENCODER.encode(value)
    for separator, escaped in _SEPARATORS:
        text = text.replace(separator, escaped)
    return b"data: " + text + b"\n\n"
