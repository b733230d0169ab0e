"""The two files of an adapter's folder, read as they stood at one moment, or refused.

Whoever replaces an adapter under a running service writes its two files one after the other. What
was read of them belongs together if neither has changed from before the first read to the last.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from ..contract.files import Stamp, stamp_of
from ..contract.foreign import has_file, open_regular, reason
from ..errors import AdapterConfigError, AdapterError, LoraexportError, WeightsError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG = 4 * 2**20
"""Bytes: a rank and an alpha for each of 20,000 modules."""
REST_SECONDS = 0.05
"""Who saves an adapter writes its second file sooner than this after the first. Longer than the
steps of a file system's clock (10 ms), so that a later write has another time."""
_NAMED = 8
"""Subfolders that a sentence names."""
_ERRORS: dict[str, type[LoraexportError]] = {
    CONFIG_FILE: AdapterConfigError,
    WEIGHTS_FILE: WeightsError,
}


class AdapterFiles:
    """Reads of an adapter's files that are all of one moment.

    Every method raises AdapterError if a file has changed since the first read.
    """

    def __init__(self, path: Path, *, at_rest: bool = False) -> None:
        """
        Args:
            at_rest: wait until nobody has written for 50 ms: a save that is half done is not read.
        """
        self.path = path
        self._stamps = _wait_for_rest(path) if at_rest else {}
        self._config_digest = b""

    def read_config(self) -> bytes:
        """The bytes of adapter_config.json. Raises AdapterConfigError."""
        with self.open(CONFIG_FILE) as opened:
            content = opened.read(MAX_CONFIG + 1)
        if len(content) > MAX_CONFIG:
            raise AdapterConfigError(
                f"{self.path / CONFIG_FILE}: more than {MAX_CONFIG >> 20} MiB, which no such file"
                " has; copy or download it again"
            )
        self._config_digest = hashlib.sha256(content).digest()
        return content

    @contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        """One of the files, which is compared again when it has been read."""
        file = self.path / name
        try:
            with open_regular(file) as opened:
                self._compare(name, stamp_of(os.fstat(opened.fileno())))
                yield opened
                self._compare(name, stamp_of(os.fstat(opened.fileno())))
        except FileNotFoundError as error:
            raise _ERRORS[name](
                describe_inner(self.path)
                or f"{file}: no such file; a PEFT adapter is a directory with {CONFIG_FILE} and"
                f" {WEIGHTS_FILE}"
            ) from error
        except OSError as error:
            raise _ERRORS[name](f"{file}: {reason(error)}") from error

    def read_weights(self) -> tuple[bytes, str]:
        """The bytes of adapter_model.safetensors, and the digest of both files: of what was read.

        Raises:
            WeightsError: they do not fit into memory.
        """
        with self.open(WEIGHTS_FILE) as opened:
            try:
                content = opened.read()
            except MemoryError as error:
                raise WeightsError(
                    f"{self.path / WEIGHTS_FILE}: it does not fit into memory; free some, or take"
                    " a smaller adapter"
                ) from error
        with self.open(CONFIG_FILE):
            pass  # the same as before
        digest = hashlib.sha256(self._config_digest + hashlib.sha256(content).digest())
        return content, digest.hexdigest()

    def digest(self) -> str:
        """sha256 over both files, as `digest_adapter`'s."""
        with self.open(WEIGHTS_FILE) as opened:
            weights = hashlib.file_digest(opened, "sha256").digest()
        with self.open(CONFIG_FILE):
            pass  # the same as when it was read
        return hashlib.sha256(self._config_digest + weights).hexdigest()

    def copy_to(self, folder: Path) -> None:
        """Write both files, as they were read, into another folder."""
        config = self.read_config()
        with self.open(WEIGHTS_FILE) as opened, (folder / WEIGHTS_FILE).open("wb") as copy:
            while block := opened.read(2**24):
                copy.write(block)
        (folder / CONFIG_FILE).write_bytes(config)

    def _compare(self, name: str, stamp: Stamp) -> None:
        if self._stamps.setdefault(name, stamp) != stamp:
            raise AdapterError(
                f"{self.path / name}: it changed while the adapter was read, so nothing of it is"
                " used; try again when it is written, and replace an adapter that is in use by"
                " renaming a folder"
            )


def describe_inner(folder: Path) -> str:
    """The sentence about a folder that holds adapters and is none; empty for any other."""
    try:
        inner = sorted(entry.name for entry in folder.iterdir() if has_file(entry / CONFIG_FILE))
    except (OSError, ValueError):  # reading the adapter says why
        return ""
    if not inner or has_file(folder / CONFIG_FILE):
        return ""
    names = ", ".join(inner[:_NAMED]) + (", …" if len(inner) > _NAMED else "")
    return (
        f"{folder}: no adapter, but a folder of {len(inner)}: {names}; give one of them, as"
        f" {folder / inner[0]}"
    )


def digest_adapter(path: Path) -> str:
    """sha256 over an adapter's two files, in hexadecimal. Raises WeightsError: one is missing."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with open_regular(path / name) as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise WeightsError(f"{path / name}: {reason(error)}") from error
    return digest.hexdigest()


def _wait_for_rest(path: Path) -> dict[str, Stamp]:
    """The stamps of both files, once they are older than REST_SECONDS."""
    for _ in range(4):
        try:
            statuses = {name: (path / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)}
        except (OSError, ValueError):
            return {}  # reading it says what is wrong
        newest = max(max(status.st_mtime, status.st_ctime) for status in statuses.values())
        age = time.time() - newest
        if not 0 <= age < REST_SECONDS:  # in the future: of another machine's clock
            return {name: stamp_of(status) for name, status in statuses.items()}
        time.sleep(REST_SECONDS - age)
    raise AdapterError(
        f"{path}: its files keep changing, so that nothing of them is read; load it when it is"
        " written, and replace an adapter that is in use by renaming a folder"
    )
