"""Adapters come and go while their artifact serves: from below allowed folders, one at a time.

A load reads into host memory and writes a slot that nobody uses, so that requests in flight end
with the weights with which they began (see `ArtifactSession`).
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from loraexport_runtime import AdapterError, AdapterInfo, LoraexportError, SlotTimeoutError
from loraexport_runtime.adapters.files import CONFIG_FILE, WEIGHTS_FILE, digest_adapter
from loraexport_runtime.contract.foreign import read_object
from loraexport_runtime.errors import AdapterConfigError

from ..config.schema import Settings
from ..errors import ApiError, of_adapter
from .host import Host
from .places import find_below

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_WAIT = 30.0
"""Seconds that a load waits for a slot."""
LoadTimes = Callable[[str, float, bool], None]
"""Is told the artifact, the seconds of a load, and whether it failed."""


def is_name(text: str) -> bool:
    """Whether a text may name an adapter: no path, no file that is hidden."""
    return _NAME.fullmatch(text) is not None


def bad_input(message: str, param: str | None = None) -> ApiError:
    """400, in the words of vLLM."""
    return ApiError(400, message, code="invalid_request", param=param, kind="InvalidUserInput")


def not_found(message: str) -> ApiError:
    """404, in the words of vLLM."""
    return ApiError(404, message, code="adapter_not_found", kind="NotFoundError")


class Updates:
    """Loads and unloads of all artifacts. The loop's thread alone uses it."""

    def __init__(self, settings: Settings, note: LoadTimes) -> None:
        self._settings, self._note = settings, note

    async def load(
        self,
        host: Host,
        name: str,
        path: Path,
        *,
        in_place: bool = False,
        pinned: bool | None = None,
    ) -> AdapterInfo:
        """Have an adapter of a folder; nothing is read again where its content is there already.

        Args:
            path: as `find_folder` gives it.
            in_place: replace one of the same name.
            pinned: it is to keep its slot, or not any more; None: as it is.

        Raises:
            ApiError: 400: no name, another one is loaded, or the adapter cannot be used; 429: no
                slot is to be had; 404: there is no adapter.
        """
        if not is_name(name):
            raise bad_input(
                "an adapter's name has letters, digits, '.', '_' and '-', at most 128, and begins"
                " with no '.'",
                "lora_name",
            )
        async with host.updating:
            try:
                await asyncio.to_thread(self._check_files, path)
                known = host.listing().get(name)
                if known is not None and not in_place:
                    raise bad_input(
                        f"The lora adapter '{name}' has already been loaded. If you want to load"
                        " the adapter in place, set 'load_inplace' to True.",
                        "lora_name",
                    )
                if known is None and len(host.listing()) >= self._settings.max_adapters:
                    most = self._settings.max_adapters
                    raise bad_input(f"{most} adapters are loaded, and no more may be")
                if known is None or await asyncio.to_thread(digest_adapter, path) != known.digest:
                    await self._load(host, name, path)
                if pinned is not None:
                    await self._pin(host, name, pinned)
            except LoraexportError as error:
                raise _without_path(error, path, name) from error
            return host.listing()[name]

    async def unload(self, host: Host, name: str) -> None:
        """Forget an adapter; requests that have begun end with it. Raises ApiError (404)."""
        async with host.updating:
            if not host.has(name):
                raise not_found(f"The lora adapter '{name}' cannot be found.")
            await asyncio.to_thread(host.adapters.unload_adapter, name)

    async def copy(self, former: Host, host: Host) -> None:
        """Load into an artifact what another one was given while it served.

        Raises:
            ApiError: an adapter cannot be used there.
        """
        for name, info in former.listing().items():
            if info.path is not None and not host.has(name):
                await self.load(host, name, info.path, pinned=info.pinned)

    def find_folder(self, text: str, watched: str | None = None) -> Path:
        """The folder that a text names below `adapter_roots`, its links followed first.

        Args:
            watched: look in this folder alone; what a link in it leads to may be below the roots.

        Raises:
            ApiError: 404: it is not there, or not below them, which are not told apart.
        """
        roots = self._settings.adapter_roots
        path = find_below(text, roots if watched is None else [watched], roots)
        if path is None:
            raise not_found("There is no adapter at lora_path, below the folders that are allowed.")
        return path

    async def _load(self, host: Host, name: str, path: Path) -> None:
        start, failed = time.monotonic(), True
        base = host.settings.base
        try:
            await asyncio.to_thread(
                host.adapters.load_adapter, name, path, base=base, timeout=_WAIT
            )
            failed = False
        finally:
            self._note(host.name, time.monotonic() - start, failed)

    async def _pin(self, host: Host, name: str, pinned: bool) -> None:
        if pinned:
            await asyncio.to_thread(host.adapters.pin, name, timeout=_WAIT)
        else:
            host.adapters.unpin(name)

    def _check_files(self, path: Path) -> None:
        """Hold sizes and ranks to the settings before anything is read as a whole.

        Raises:
            AdapterError: a file is missing, too large, or names too large a rank.
        """
        try:
            size = sum((path / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
        except OSError as error:
            raise AdapterError(
                f"{path}: no adapter, which is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            ) from error
        most = self._settings.max_adapter_bytes
        if size > most:
            raise AdapterError(f"{path}: its files have {size} bytes, and {most} are allowed")
        config = read_object(path / CONFIG_FILE, AdapterConfigError)
        pattern = config.get("rank_pattern")
        ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        largest = max((rank for rank in ranks if isinstance(rank, int)), default=0)
        if largest > self._settings.max_adapter_rank:
            raise AdapterError(
                f"{path}: its rank is {largest}, and {self._settings.max_adapter_rank} is allowed"
            )


def _without_path(error: LoraexportError, path: Path, name: str) -> Exception:
    """What a client is told: the reason, and no place on the server's disk."""
    refusal = of_adapter(error)
    if isinstance(error, SlotTimeoutError) or refusal is None:
        return refusal or error
    refusal.message = refusal.message.replace(str(path), f"adapter '{name}'")
    return refusal
