"""A server's life: ports open, artifacts are loaded, requests answered, and then drained."""

import asyncio
import gc
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loraexport_runtime import LoraexportError

from .app import make_admin_app, make_app
from .auth import read_keys
from .config.schema import Settings, models_of
from .errors import ApiError
from .metrics.traces import open_traces
from .ports import Port, listen, listen_at_path
from .service import Phase, Service

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def serve(settings: Settings, variables: Mapping[str, str]) -> None:
    """Serve until SIGTERM or SIGINT, answer what was accepted, and give everything up.

    A second signal ends it at once.

    Args:
        variables: the process's environment, for its keys.

    Raises:
        LoraexportError: a file of keys is damaged, or an artifact cannot be served.
        OSError: a port is taken.
    """
    service = Service(settings, read_keys(settings, variables), open_traces(settings, variables))
    if service.keys.is_open and settings.host not in ("127.0.0.1", "localhost", "::1"):
        _LOG.warning("anybody who reaches %s may ask: there are no keys", settings.host)
    with ExitStack() as stack:
        ports = _open_ports(service, stack)
        with _signals(service, ports) as ending:
            loading = await _run(service, ports, ending)
    if not loading.cancelled() and (error := loading.exception()) is not None:
        raise error


def _open_ports(service: Service, stack: ExitStack) -> list[Port]:
    settings, stalled = service.settings, service.meter.stalled.inc
    clients = stack.enter_context(listen(settings, settings.port, "clients"))
    ports = [Port(settings, make_app(service), clients, stalled)]
    if settings.socket is not None:
        beside = stack.enter_context(listen_at_path(Path(settings.socket), "clients"))
        ports.append(Port(settings, make_app(service), beside, stalled))
    if settings.admin_socket is not None:
        operators = stack.enter_context(listen_at_path(Path(settings.admin_socket), "operators"))
        ports.append(Port(settings, make_admin_app(service), operators, stalled))
    elif settings.admin_port is not None:
        operators = stack.enter_context(listen(settings, settings.admin_port, "operators"))
        ports.append(Port(settings, make_admin_app(service), operators, stalled))
    return ports


@contextmanager
def _signals(service: Service, ports: Sequence[Port]) -> Iterator[asyncio.Event]:
    """An event that the first signal sets; the second one gives up what is not answered."""
    ending, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        if ending.is_set():
            _LOG.warning("asked to end again: what is not answered yet is given up")
            for port in ports:
                port.force_exit = True
        service.phase = Phase.DRAINING
        ending.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield ending
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _run(
    service: Service, ports: Sequence[Port], ending: asyncio.Event
) -> asyncio.Task[None]:
    """Serve and load until the end. Returns the load, which has ended too."""
    running = [asyncio.create_task(port.run_here()) for port in ports]
    loading = asyncio.create_task(_load(service))
    try:
        await _until(ending, running, loading)
    finally:
        if service.phase is not Phase.FAILED:
            service.phase = Phase.DRAINING
        for port in ports:
            port.should_exit = True
        loading.cancel()
        await asyncio.gather(*running, loading, return_exceptions=True)
        await service.close()
    return loading


async def _until(
    ending: asyncio.Event, running: Sequence[asyncio.Task[None]], loading: asyncio.Task[None]
) -> None:
    """Return once the server is to end: by a signal, or as a port or a load has failed."""
    told = asyncio.create_task(ending.wait())
    waiting: set[asyncio.Task[Any]] = {told, loading, *running}
    try:
        while told in waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if loading in done and loading.exception() is None:
                done.discard(loading)
            if done:
                return
    finally:
        told.cancel()


async def _load(service: Service) -> None:
    """Open every artifact, one after the other, and be ready."""
    try:
        for name, model in models_of(service.settings).items():
            await service.start(name, model)
    except (LoraexportError, ApiError):
        service.phase = Phase.FAILED
        raise
    if service.phase is Phase.STARTING:
        gc.freeze()  # what was opened stays, and is not walked through while requests come
        service.phase = Phase.READY
        _LOG.info("ready: %s", ", ".join(host.name for host in service.catalog))
