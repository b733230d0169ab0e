"""Where a server listens: a port of clients, and one, or a socket, of operators."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .config.schema import Settings

_LOG = logging.getLogger(__name__)
_BACKLOG = 2048
_GRACE = 0.25
"""Seconds, at the end, for whoever has connected and not sent a request yet."""
_KEEP_ALIVE = 75
"""Seconds until an idle connection is closed; proxies keep theirs for 60, and are to end first."""
_LEAST_READ = 16 * 1024
"""Bytes that a client reads at least in each `write_timeout`, while more are there for it."""


class _Joined:
    """A transport that sends at once what is written in one turn of the loop: uvloop's makes a call
    of the system for each write, and a response is two of them."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER_LIMIT:
            self._flush()  # whoever writes is to know what is not read

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))


class _Connection(HttpToolsProtocol):
    """One that is cut where its client does not read what was sent: its request ends as one whose
    client has gone, so that it holds neither a row nor an artifact that was exchanged."""

    def __init__(
        self, *args: Any, timeout: float, on_stalled: Callable[[], None], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._timeout, self._on_stalled = timeout, on_stalled
        self._looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._rest()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()  # it is closed once all is read

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Look, from now on, whether the client reads."""
        if self._timeout and self._looking is None:
            self._look_later()

    def _look_later(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._looking = self.loop.call_later(self._timeout, self._look, left)

    def _look(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left == 0 or before - left >= _LEAST_READ:
            self._look_later()
            return
        _LOG.info("a client reads nothing of its answer: its connection is cut")
        self._on_stalled()
        self.transport.abort()

    def _rest(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None


class Port(uvicorn.Server):
    """An application at a socket; the process's signals are whoever's runs it."""

    def __init__(
        self,
        settings: Settings,
        app: Any,
        listening: socket.socket,
        on_stalled: Callable[[], None],
    ) -> None:
        """`on_stalled`: is called for each connection whose client reads nothing."""
        tls: dict[str, Any] = {}
        if settings.tls_certificate is not None and listening.family != socket.AF_UNIX:
            tls = {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key}
            if settings.tls_client_ca is not None:
                tls |= {"ssl_ca_certs": settings.tls_client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,  # nothing here asks who the client is
                ws="none",
                http=partial(  # type: ignore[arg-type]  # as a class is called
                    _Connection, timeout=settings.write_timeout, on_stalled=on_stalled
                ),
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
                **tls,
            )
        )
        self._listening = listening

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, then end those that there are.

        A request that is on its way over one of them is told so, with 503; it found the connection
        closed.
        """
        for server in self.servers:
            server.close()
        await asyncio.sleep(_GRACE)
        await super().shutdown(sockets)

    async def run_here(self) -> None:
        """Serve until `should_exit` is set and what was accepted is answered."""
        await self.serve([self._listening])


def listen(settings: Settings, port: int, whose: str) -> socket.socket:
    """A socket at a port of the settings' host. Raises OSError: it is taken, or no address."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.create_server((settings.host, port), family=family, backlog=_BACKLOG)
    scheme = "http" if settings.tls_certificate is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    _LOG.info("%s at %s://%s:%d", whose, scheme, host, listening.getsockname()[1])
    return listening


@contextmanager
def listen_at_path(path: Path, whose: str) -> Iterator[socket.socket]:
    """A Unix socket that this user alone can open; its file goes in the end.

    Raises:
        OSError: something that is no socket has its name, or the folder cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()  # of a server that was killed
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    _LOG.info("%s at %s", whose, path)
    try:
        yield listening
    finally:
        listening.close()
        path.unlink(missing_ok=True)
