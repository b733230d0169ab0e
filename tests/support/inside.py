"""A server in this process: real sockets, and its parts within reach."""

import asyncio
import json
import socket
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import uvloop

from loraexport_serve.app import make_app
from loraexport_serve.auth import Keys
from loraexport_serve.config.schema import Settings, models_of
from loraexport_serve.hosts.host import Host
from loraexport_serve.metrics.traces import Traces
from loraexport_serve.ports import Port, listen
from loraexport_serve.service import Phase, Service
from support.serving import START
from support.waiting import DEADLINE

T = TypeVar("T")


class Inside:
    """One server; its loop runs in a thread."""

    def __init__(self, service: Service, address: tuple[str, int]) -> None:
        self.service, self.address = service, address
        self.loop = uvloop.new_event_loop()
        self.client = httpx.Client(
            base_url=f"http://{address[0]}:{address[1]}", timeout=DEADLINE, trust_env=False
        )

    def run(self, work: Coroutine[Any, Any, T], seconds: float = DEADLINE) -> T:
        """What it gives, in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def host(self, name: str) -> Any:
        """An artifact in service."""
        found: Host | None = self.service.catalog.get(name)
        assert found is not None
        return found

    @contextmanager
    def asking(self, path: str, buffer: int | None = None, /, **body: Any) -> Iterator[Any]:
        """A socket over which a body was sent. Args: buffer: bytes that it takes unread."""
        with socket.socket() as plain:
            plain.settimeout(DEADLINE)
            if buffer is not None:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            plain.connect(self.address)
            content = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\n\r\n"
            plain.sendall(head.encode() + content)
            yield plain

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 of one that is not there."""
        return self.service.meter.registry.get_sample_value(name, labels) or 0.0


class Held:
    """A call of something that waits until it is let go; those ahead of it go on."""

    def __init__(self, owner: Any, name: str, skip: int = 0) -> None:
        """`skip`: so many calls go on."""
        self._real, self._skip = getattr(owner, name), skip
        self._reached, self._free = threading.Event(), threading.Event()
        setattr(owner, name, self._call)

    def wait(self) -> None:
        """Until the call is made."""
        assert self._reached.wait(DEADLINE)

    def release(self) -> None:
        """Let it, and all that follow, go on."""
        self._free.set()

    def _call(self, *args: Any, **options: Any) -> Any:
        self._skip -= 1
        if self._skip < 0:
            self._reached.set()
            assert self._free.wait(DEADLINE)
        return self._real(*args, **options)


@contextmanager
def held(owner: Any, name: str, skip: int = 0) -> Iterator[Held]:
    """While it lasts, a call of an object's method, or of a function that it has, waits."""
    own = vars(owner).get(name)
    holding = Held(owner, name, skip)
    try:
        yield holding
    finally:
        holding.release()
        if own is None:
            delattr(owner, name)  # what stands in the way of its class's
        else:
            setattr(owner, name, own)


@contextmanager
def inside(
    traces: Traces | None = None, send_buffer: int | None = None, **settings: Any
) -> Iterator[Inside]:
    """A server with these settings, at a free port, ready.

    Args:
        send_buffer: bytes that a connection takes at most which nobody reads.
    """
    given = Settings(port=0, **settings)
    service = Service(given, Keys(), traces)
    with listen(given, 0, "clients") as listening:
        if send_buffer is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        server = Inside(service, listening.getsockname())
        port = Port(given, make_app(service), listening, service.meter.stalled.inc)
        thread = threading.Thread(target=server.loop.run_until_complete, args=[port.run_here()])

        async def load() -> None:
            for name, model in models_of(given).items():
                await service.start(name, model)
            service.phase = Phase.READY

        loading = asyncio.run_coroutine_threadsafe(load(), server.loop)
        thread.start()
        try:
            loading.result(START)
            yield server
        finally:
            server.client.close()
            server.run(service.close())
            port.should_exit = True
            thread.join(DEADLINE)
            server.loop.close()
