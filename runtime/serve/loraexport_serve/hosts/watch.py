"""A folder whose subfolders are adapters, `NAME/adapter_config.json`, looked at again and again.

What comes is loaded, what changes is replaced, what goes is unloaded. A folder that cannot be used
is tried once for each of its changes, and the adapter that serves stays; so does whatever serves
while a folder cannot be looked at.
"""

import asyncio
import errno
import logging
from collections.abc import Mapping
from pathlib import Path

from loraexport_runtime.adapters.files import CONFIG_FILE, WEIGHTS_FILE

from ..errors import ApiError
from .host import Host
from .updates import Updates, is_name

_LOG = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int], ...]


class Watch:
    """One folder of one artifact."""

    def __init__(self, host: Host, folder: str, updates: Updates) -> None:
        self._host, self._updates = host, updates
        self._folder = Path(folder)
        self._seen: dict[str, _Stamp] = {}
        """What was tried, by name."""
        self._own: set[str] = set()
        """The adapters that serve because of this folder."""
        self._looking = asyncio.Lock()

    async def run(self, seconds: float) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.look()
            except Exception:
                _LOG.exception("%s: a look into its adapters' folder failed", self._host.name)

    async def look(self) -> None:
        """Load, replace and unload until the artifact has what the folder has."""
        async with self._looking:
            there = await asyncio.to_thread(_read_stamps, self._folder)
            if there is None:
                return
            for name, stamp in sorted(there.items()):
                if stamp and self._seen.get(name) != stamp:
                    await self._take(name, stamp)
            for name in self._seen.keys() - there.keys():
                del self._seen[name]
                if name in self._own:
                    self._own.discard(name)
                    await self._drop(name)

    async def find(self, name: str) -> bool:
        """Load an adapter that has come since the last look. Returns whether it is there now."""
        if not is_name(name):
            return False
        # Whoever asks may go: what has begun is noted all the same.
        finding = asyncio.ensure_future(self._find(name))
        await asyncio.shield(finding)
        return self._host.has(name)

    async def _find(self, name: str) -> None:
        async with self._looking:
            stamp = await asyncio.to_thread(_stamp_of, self._folder, name)
            if stamp and self._seen.get(name) != stamp:
                await self._take(name, stamp)

    async def _take(self, name: str, stamp: _Stamp) -> None:
        self._seen[name] = stamp
        if self._host.has(name) and name not in self._own:
            _LOG.warning(
                "%s: its folder has an adapter %r, which was loaded otherwise and stays",
                self._host.name,
                name,
            )
            return
        try:
            path = self._updates.find_folder(name, str(self._folder))
            await self._updates.load(self._host, name, path, in_place=True)
        except ApiError as error:
            _LOG.warning("%s: adapter %r is not loaded: %s", self._host.name, name, error.message)
            if error.status == 429:
                del self._seen[name]  # no slot was free; later one may be
            return
        self._own.add(name)

    async def _drop(self, name: str) -> None:
        try:
            await self._updates.unload(self._host, name)
        except ApiError:
            _LOG.info("%s: adapter %r was unloaded already", self._host.name, name)


def _read_stamps(folder: Path) -> Mapping[str, _Stamp] | None:
    """The adapters of a folder, and what changes with their files.

    None where the folder itself cannot be read: nothing is known of its adapters then, as while a
    file system is away, and whatever serves stays.
    """
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        _LOG.warning("the folder of adapters cannot be read, and what served stays: %s", error)
        return None
    stamps = {name: _stamp_of(folder, name) for name in names if is_name(name)}
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def _stamp_of(folder: Path, name: str) -> _Stamp | None:
    """None of what is no adapter, or not yet; an empty one of what cannot be looked at now."""
    stamps = []
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            status = (folder / name / file).stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            return None if error.errno == errno.ELOOP else ()
        stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(stamps)
