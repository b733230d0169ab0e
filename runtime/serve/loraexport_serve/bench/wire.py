"""HTTP/1.1 as a load generator needs it: kept connections, one request at a time, little CPU."""

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from loraexport_runtime.errors import InputError

BROKEN = 0
"""The status of a request whose connection failed, or that was given up."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    body: bytes = b""
    first: float = 0.0
    """When the first byte of the body came, by `time.perf_counter`; 0 where none did."""


class Connection(asyncio.Protocol):
    """A connection to a server."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiting: asyncio.Future[Reply] | None = None
        self._parts: list[bytes] = []
        self._first = 0.0
        self.since = time.perf_counter()
        """When its last answer came."""

    @property
    def is_open(self) -> bool:
        """Whether it takes another request."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, timeout: float) -> Reply:
        """The answer to a whole request; status BROKEN if none came within so many seconds."""
        if self._transport is None or not self.is_open:
            return Reply(BROKEN)
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(timeout):
                return await self._waiting
        except TimeoutError:
            self.close()
            return Reply(BROKEN)

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.close()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(Reply(BROKEN))

    # What the parser calls

    def on_message_begin(self) -> None:
        self._parts, self._first = [], 0.0

    def on_body(self, body: bytes) -> None:
        self._first = self._first or time.perf_counter()
        self._parts.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._end(Reply(status, b"".join(self._parts), self._first))

    def _end(self, reply: Reply) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(reply)


class Place:
    """Where a server is: `http://host:port`, or https."""

    def __init__(self, url: str, key: str | None) -> None:
        """Raises InputError: it is no address of a server."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InputError(f"{url}: expected http://HOST:PORT")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host, self._is_safe = parts.hostname, parts.scheme == "https"
        self._port = port or (443 if self._is_safe else 80)
        lines = [f"host: {parts.netloc}", "content-type: application/json"]
        if key:
            lines.append(f"authorization: Bearer {key}")
        self._head = "\r\n".join(lines)

    async def connect(self) -> Connection:
        """Another connection. Raises OSError."""
        loop = asyncio.get_running_loop()
        safe = ssl.create_default_context() if self._is_safe else None
        _, made = await loop.create_connection(Connection, self._host, self._port, ssl=safe)
        return made

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request as it is written."""
        head = f"{method} {path} HTTP/1.1\r\n{self._head}\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body
