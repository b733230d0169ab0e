"""What all routes share: settings, keys, artifacts, counters, and in which phase the server is."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import TypeVar

from loraexport_runtime import RequestTimeoutError

from .auth import Caller, Keys
from .config.schema import ModelSettings, Settings
from .errors import ApiError
from .hosts.catalog import Catalog
from .hosts.host import Host
from .hosts.opening import open_host, pin
from .hosts.updates import Updates
from .hosts.watch import Watch
from .metrics.meter import Meter
from .metrics.state import State
from .metrics.traces import Traces

T = TypeVar("T")
_SMALL = 4_000
"""Characters that are tokenized sooner than handed to another thread."""
_THREADS = 4
_COMPILERS = 2
"""Threads that compile grammars, beside those for texts, which a grammar would hold up."""


class Phase(Enum):
    """Of a server's life; its value is what a probe answers."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """One server. The loop's thread alone uses it."""

    def __init__(self, settings: Settings, keys: Keys, traces: Traces | None = None) -> None:
        self.settings, self.keys, self.traces = settings, keys, traces
        self.catalog = Catalog()
        self.phase = Phase.STARTING
        self.meter = Meter(settings.metrics_adapters)
        self.meter.registry.register(State(self.catalog, self.meter))
        self.updates = Updates(settings, self.meter.note_load)
        self.watches: dict[str, Watch] = {}
        """The watched folders, by artifact."""
        self.exchanging = asyncio.Lock()
        """Held by who exchanges an artifact, so that no two are opened beside those that serve."""
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "loraexport-texts")
        self._compilers = ThreadPoolExecutor(_COMPILERS, "loraexport-grammars")

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests, and what it has computed lately did not fail."""
        return self.phase is Phase.READY and all(host.is_healthy for host in self.catalog)

    def require_phase(self) -> None:
        """Raise ApiError (503) unless it takes requests."""
        if self.phase is not Phase.READY:
            message = f"The server is {self.phase.value}; try again later."
            raise ApiError(503, message, code=self.phase.value)

    async def start(self, name: str, model: ModelSettings) -> Host:
        """Open an artifact, and let it serve under a name from the next request on.

        One that did so far serves until then, and is closed once nobody uses it. The adapters that
        it was given meanwhile come along.

        Raises:
            LoraexportError, ApiError: the artifact cannot be served, or one of its adapters cannot;
                whatever served so far does.
        """
        host = await open_host(name, model, self.settings)
        watch = None
        try:
            if model.adapter_folder is not None:
                watch = Watch(host, model.adapter_folder, self.updates)
                await watch.look()
            if (former := self.catalog.get(name)) is not None:
                await self.updates.copy(former, host)
            await pin(host)
        except BaseException:
            await asyncio.to_thread(host.close)
            raise
        if (looking := self._looking.pop(name, None)) is not None:
            looking.cancel()
        former = self.catalog.put(host)
        self.watches.pop(name, None)
        if watch is not None:
            self.watches[name] = watch
            run = watch.run(self.settings.adapter_refresh)
            self._looking[name] = asyncio.create_task(run)
        if former is not None:
            await former.wait_idle()
            await asyncio.to_thread(former.close)
        return host

    async def find_adapters(self, caller: Caller, names: Iterable[str | None]) -> None:
        """Load those of these that nobody has loaded, but a watched folder has by now."""
        if not self.watches:
            return
        for name in names:
            if name is None or self.catalog.get(name) is not None:
                continue
            for host, adapter in self.catalog.candidates(caller, name):
                if (watch := self.watches.get(host.name)) is not None:
                    await watch.find(adapter)

    async def read_texts(self, size: int, read: Callable[[], T]) -> T:
        """What `read` gives, beside the loop where `size` characters take a while."""
        return read() if size <= _SMALL else await self.beside(read)

    async def beside(self, work: Callable[[], T]) -> T:
        """What `work` gives, in one of the threads for texts."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def compile(self, work: Callable[[], T]) -> T:
        """What `work` gives, in one of the threads for grammars.

        Raises RequestTimeoutError: not within `queue_timeout`; then it goes on by itself.
        """
        seconds = self.settings.queue_timeout
        compiling = asyncio.get_running_loop().run_in_executor(self._compilers, work)
        try:
            return await asyncio.wait_for(compiling, seconds or None)
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"the grammar was not compiled within {seconds:g} seconds; make it smaller, or try"
                " again later"
            ) from error

    async def close(self) -> None:
        """Give everything up; it waits for what runs."""
        for looking in self._looking.values():
            looking.cancel()
        for host in self.catalog:
            await asyncio.to_thread(host.close)
        for pool in (self._pool, self._compilers):
            pool.shutdown(wait=False, cancel_futures=True)
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)
