"""A server in this process: real sockets, and its parts within reach."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

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
        self.loop = asyncio.new_event_loop()
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

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 of one that is not there."""
        return self.service.meter.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def inside(traces: Traces | None = None, **settings: Any) -> Iterator[Inside]:
    """A server with these settings, at a free port, ready."""
    given = Settings(port=0, **settings)
    service = Service(given, Keys(), traces)
    with listen(given, 0, "clients") as listening:
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
            server.client.close()
            server.run(service.close())
        finally:
            port.should_exit = True
            thread.join(DEADLINE)
            server.loop.close()
