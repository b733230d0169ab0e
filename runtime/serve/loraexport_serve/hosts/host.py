"""An artifact in service: what is open of it, its names, and who is using it."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from loraexport_runtime import AdapterInfo, ClosedError
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.slots.hosted import HostsAdapters

from ..config.schema import ModelSettings
from .texts import TextEncoder

MOST_FAILURES = 5
"""In a row, after which an artifact counts as broken: each was a fault of the server's own."""


class Host:
    """An open artifact with its adapters; `EncoderHost` and `DecoderHost` compute.

    The loop's thread alone uses what is of this class; the session below takes any thread.
    """

    kind: ClassVar[str]
    """What it is, in an error's text."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        manifest: Manifest,
        adapters: HostsAdapters,
        texts: TextEncoder | None,
        max_model_len: int | None,
    ) -> None:
        """
        Args:
            adapters: the session, or the generator, for its adapters.
            texts: its tokenizer; None of an artifact without one.
            max_model_len: tokens of a text, or of a prompt and its answer; None: any number.
        """
        self.name, self.settings, self.manifest = name, settings, manifest
        self.adapters, self.texts, self.max_model_len = adapters, texts, max_model_len
        self.created = int(time.time())
        self.updating = asyncio.Lock()
        """Held by who changes which adapters there are."""
        self.in_flight = Counter[str]()
        """How many requests name an adapter now."""
        self._failures = self._refusals = 0
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """Give everything up, once nobody uses it; it waits for what runs."""
        raise NotImplementedError

    def has(self, adapter: str) -> bool:
        """Whether a request may name an adapter."""
        return self.adapters.host.slots.is_read(adapter) is not None

    def listing(self) -> dict[str, AdapterInfo]:
        """Every adapter that a request may name."""
        return self.adapters.list_adapters()

    async def prepare(self, names: Iterable[str]) -> None:
        """Read the adapters that nobody has read from disk yet, beside the loop.

        Raises:
            LoraexportError: one is not there any more, or damaged.
        """
        slots = self.adapters.host.slots
        for name in names:
            if slots.is_read(name) is False:
                await asyncio.to_thread(slots.read, name)

    @contextmanager
    def use(self, names: Sequence[str] = ()) -> Iterator[None]:
        """While it lasts, the artifact is not closed. Args: names: the adapters that are named."""
        self._users += 1
        self._idle.clear()
        for name in names:
            self.in_flight[name] += 1
        try:
            yield
        finally:
            self._users -= 1
            for name in names:
                self.in_flight[name] -= 1
                if not self.in_flight[name]:
                    del self.in_flight[name]
            if not self._users:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Until nobody uses it."""
        await self._idle.wait()

    @property
    def is_healthy(self) -> bool:
        """Whether it computes; not after several failures in a row."""
        return self._failures < MOST_FAILURES

    @property
    def is_dead(self) -> bool:
        """Whether nothing but another start helps: it refuses all, and nobody has closed it."""
        return self._refusals >= MOST_FAILURES

    def note(self, error: BaseException | None) -> None:
        """A request was answered; with an error: that was a fault of the server's own."""
        self._failures = 0 if error is None else self._failures + 1
        self._refusals = self._refusals + 1 if isinstance(error, ClosedError) else 0
