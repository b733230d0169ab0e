"""The adapters of whatever is open and hosts some: listed, loaded, pinned, unloaded."""

import logging
from pathlib import Path

from .gate import Gate
from .host import AdapterHost
from .info import AdapterInfo

_LOG = logging.getLogger(__name__)


class HostsAdapters:
    """The methods of a session, or of a generator, for its adapters."""

    _gate: Gate
    _host: AdapterHost

    @property
    def host(self) -> AdapterHost:
        """What holds the adapters."""
        return self._host

    @property
    def adapters(self) -> dict[str, int]:
        """The adapters that sit in slots now, name -> slot. Runs may name more: `list_adapters`."""
        with self._gate.entry(), self._gate:
            return self._host.slots.loaded

    def list_adapters(self) -> dict[str, AdapterInfo]:
        """Every adapter that a run may name: its slot if it is in one, its digest, its ranks."""
        with self._gate.entry(), self._gate:
            return self._host.slots.listing()

    def load_adapter(
        self,
        name: str,
        path: str | Path | None = None,
        *,
        scale: float = 1.0,
        base: str | Path | None = None,
        timeout: float | None = None,
    ) -> int:
        """Put an adapter into a slot, in place; other rows are undisturbed. Returns the slot.

        The name of a loaded adapter replaces it: a run sees the old weights or the new ones. With
        no slot free, the least recently used adapter without a pin is paged out to host memory.
        The load takes its slot at once, not on first use, so that the first run finds it there.

        Args:
            path: a PEFT directory; default: the adapter of this name that the artifact carries,
                with the scale of its spec.
            scale: multiplies the adapter's scaling.
            base: the base's directory, which an adapter with DoRA needs: its outputs are scaled by
                m / ||W + s B A||. W is found there by its digest.
            timeout: seconds to wait for a slot, once the adapter is read; None: as long as the runs
                take that hold it.

        Raises:
            AdapterError, WeightsError: the adapter cannot be used here; nothing has changed.
            SlotsExceededError: every slot is kept for a pinned adapter; nothing has changed.
            SlotTimeoutError: no slot was free in time; nothing has changed.
            ClosedError: the session is closed.
        """
        with self._gate.entry(), self._gate:
            read = None if path is None else Path(path)
            return self._host.load(name, read, scale, None if base is None else Path(base), timeout)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, in host memory too; runs that use it finish, and a pin ends.

        Raises UnknownAdapterError, ClosedError.
        """
        with self._gate.entry(), self._gate:
            self._host.slots.remove(name)
        _LOG.info("adapter %r unloaded", name)

    def pin(self, name: str, *, timeout: float | None = None) -> int:
        """Bring an adapter into a slot, and keep it there until `unpin`. Returns the slot.

        Args:
            timeout: seconds to wait for a slot; None: as long as it takes.

        Raises:
            UnknownAdapterError: it is not loaded.
            SlotsExceededError: every slot is kept for another pinned adapter.
            SlotTimeoutError: no slot was free in time; nothing has changed.
            ClosedError: the session is closed.
        """
        with self._gate.entry(), self._gate:
            return self._host.slots.pin(name, timeout)

    def unpin(self, name: str) -> None:
        """Allow it to be paged out again. Raises UnknownAdapterError, ClosedError."""
        with self._gate.entry(), self._gate:
            self._host.slots.unpin(name)
