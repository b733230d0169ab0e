"""The files that a manifest lists, as they were listed: each read is held to its digest.

A session keeps one for as long as it is open, so that what is read late is what was checked.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from ..errors import ArtifactError
from .files import MANIFEST_FILE, FileEntry, resolve
from .foreign import open_regular, reason

Stamp = tuple[int, int, int]
"""Inode, size and time of the last change."""


class ListedFiles:
    """The listed files below an artifact's folder."""

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        self.folder = folder
        self._entries = entries

    def __contains__(self, path: object) -> bool:
        return path in self._entries

    def below(self, folder: str) -> frozenset[str]:
        """The listed paths below a folder of the artifact."""
        return frozenset(path for path in self._entries if path.startswith(f"{folder}/"))

    @contextmanager
    def open(self, path: str) -> Iterator[BufferedReader]:
        """A listed file, by its path in the manifest, once its digest was compared.

        What is read meanwhile is of the file that was compared, whatever takes its name.

        Raises:
            ArtifactError: it is not listed, not there any more, or not what was listed.
        """
        entry = self._entries.get(path)
        file = resolve(self.folder, path)
        if entry is None:
            raise ArtifactError(
                f"{file}: {MANIFEST_FILE} does not list it, so nothing vouches for it and it is not"
                " read; build the artifact again"
            )
        try:
            opened = _open_sized(file, entry.size)
        except OSError as error:
            raise ArtifactError(
                f"{file}: {reason(error)}; it was damaged, or the artifact was removed or replaced"
                " since it was opened: open it again"
            ) from error
        with opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != entry.sha256:
                raise ArtifactError(
                    f"{file}: its digest differs from the manifest's; it was damaged, or the"
                    " artifact was replaced since it was opened: open it again"
                )
            opened.seek(0)
            yield opened

    def stamps(self) -> dict[str, Stamp | None]:
        """What tells, without reading them, whether files were exchanged or written to."""
        return {path: _stamp(self.folder / path) for path in self._entries}


def _open_sized(file: Path, size: int) -> BufferedReader:
    """A regular file of so many bytes. Raises OSError: it is another."""
    opened = open_regular(file)
    if os.fstat(opened.fileno()).st_size == size:
        return opened
    opened.close()
    raise OSError(None, f"not the {size} bytes that the manifest lists")


def _stamp(file: Path) -> Stamp | None:
    """None of a file that is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
