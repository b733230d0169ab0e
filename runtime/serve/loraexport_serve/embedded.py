"""The server without ports, for a program that has some of its own: its routes are called."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from .app import make_app
from .auth import read_keys
from .config.schema import Settings, models_of
from .metrics.traces import open_traces
from .service import Phase, Service

_TO_LEAVE = 1.0
"""Seconds that a request has to end by itself once nobody waits for its answer."""


@dataclass(frozen=True)
class Reply:
    """What a request was answered; of a stream the chunks come while it is computed."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncGenerator[bytes, None]
    """Is to be closed (`aclose`) by whoever does not read it to its end: that cancels the rest."""

    async def body(self) -> bytes:
        """All chunks."""
        return b"".join([chunk async for chunk in self.chunks])


class Embedded:
    """One server; its event loop's thread alone uses it."""

    def __init__(self, settings: Settings, variables: Mapping[str, str]) -> None:
        """Args: variables: the process's environment, for its keys."""
        self._service = Service(
            settings, read_keys(settings, variables), open_traces(settings, variables)
        )
        self._app = make_app(self._service)

    async def start(self) -> Self:
        """Open every artifact, and be ready.

        Raises:
            LoraexportError, ApiError: an artifact, or a pinned adapter, cannot be served.
        """
        service = self._service
        try:
            for name, model in models_of(service.settings).items():
                await service.start(name, model)
        except BaseException:
            service.phase = Phase.FAILED
            await service.close()
            raise
        service.phase = Phase.READY
        return self

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests, and what it has computed lately did not fail."""
        return self._service.is_ready

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        """What a client is answered; where the caller is cancelled, so is the request."""
        given = (headers or {}).items()
        names = [(name.lower().encode(), value.encode("latin-1")) for name, value in given]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": names,
            "client": None,
            "server": None,
        }
        exchange = _Exchange(body)
        work = asyncio.ensure_future(self._app(scope, exchange.receive, exchange.send))
        work.add_done_callback(exchange.end)
        try:
            start = await exchange.sent.get()
        except BaseException:
            await exchange.leave(work)
            raise
        if start is None:
            work.result()  # of an error that is not answered; there is none
            raise RuntimeError("the application ended without an answer")
        answered = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        return Reply(start["status"], answered, exchange.chunks(work))

    async def close(self) -> None:
        """Answer what was accepted, within `shutdown_timeout`, and give everything up."""
        service = self._service
        service.phase = Phase.DRAINING
        with suppress(TimeoutError):
            async with asyncio.timeout(service.settings.shutdown_timeout):
                for host in service.catalog:
                    await host.wait_idle()
        await service.close()


class _Exchange:
    """One request and its answer, in ASGI's messages."""

    def __init__(self, body: bytes) -> None:
        self._request: dict[str, Any] | None = {"type": "http.request", "body": body}
        self._gone = asyncio.Event()
        self.sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        """What the application has sent; None: it has ended."""

    async def receive(self) -> dict[str, Any]:
        if self._request is not None:
            request, self._request = self._request, None
            return request
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.sent.put(message)

    def end(self, work: asyncio.Future[None]) -> None:
        self.sent.put_nowait(None)

    async def chunks(self, work: asyncio.Future[None]) -> AsyncGenerator[bytes, None]:
        try:
            while (message := await self.sent.get()) is not None:
                yield message.get("body", b"")
                if not message.get("more_body", False):
                    return
        finally:
            await self.leave(work)

    async def leave(self, work: asyncio.Future[None]) -> None:
        """Nobody reads any more: the application may see it by itself, or it is cancelled."""
        self._gone.set()
        done, _ = await asyncio.wait({work}, timeout=_TO_LEAVE)
        if not done:
            work.cancel()
            await asyncio.wait({work})
