"""Paths that stay inside an artifact, and the digests of files."""

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import ArtifactError, InputError

MANIFEST_FILE = "manifest.json"
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    size: int


def resolve(folder: Path, path: str) -> Path:
    """A manifest path as a file below `folder`; raises ArtifactError if it leaves the folder."""
    pure = PurePosixPath(path)
    unsafe = not path or "\\" in path or "\0" in path or pure.is_absolute() or ".." in pure.parts
    try:
        # OSError: a name that is too long. RuntimeError: links that lead in a circle.
        unsafe = unsafe or not (folder / path).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        unsafe = True
    if unsafe:
        raise ArtifactError(
            f"{folder}: the manifest's path {path!r} leaves the artifact's folder, so nothing is"
            " read from it; do not use this artifact, build it again"
        )
    return folder / path


def difference(file: Path, entry: FileEntry) -> str:
    """How a file differs from its entry; empty if it does not. Raises OSError: it is unreadable."""
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"listed in {MANIFEST_FILE} but missing"
    if not stat.S_ISREG(status.st_mode):
        return f"listed in {MANIFEST_FILE} but missing"
    size = status.st_size
    if size != entry.size:
        return f"{size} bytes, but the manifest says {entry.size}"
    if digest_file(file) != entry.sha256:
        return "its sha256 differs from the manifest's: the file was changed or damaged"
    return ""


def check_pin(digest: str | None) -> None:
    """Raise InputError unless it is a sha256 to pin an artifact to, or None."""
    if digest is not None and not (
        isinstance(digest, str) and re.fullmatch("[0-9a-fA-F]{64}", digest)
    ):
        raise InputError(
            f"digest is {digest!r}; expected the 64 hexadecimal digits of the sha256 of"
            f" {MANIFEST_FILE}, as 'loraexport build' and 'loraexport inspect' show it"
        )


def require_pinned(file: Path, content: bytes, digest: str | None) -> None:
    """Raise ArtifactError unless a file's bytes have the sha256 that the caller pinned, if any."""
    actual = hashlib.sha256(content).hexdigest()
    if digest is not None and digest.lower() != actual:
        raise ArtifactError(
            f"{file}: its sha256 is {actual}, but the pinned digest is {digest.lower()}: this is"
            " another artifact, or it was changed; copy the right one here, or pin this one, if it"
            " is what you want"
        )


def stamp_of(status: os.stat_result) -> Stamp:
    """What a write, a replacement or another length changes."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
