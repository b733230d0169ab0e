"""A folder that is whole or not there: staging beside the target, then one atomic switch."""

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loraexport_runtime.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    ParitySummary,
    digest_file,
)

from .errors import BuildBusyError, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux, renameat2
_RENAME_SWAP = 2  # macOS, renamex_np


@dataclass(frozen=True)
class Staging:
    """A build in progress: nobody sees `folder` before `publish`."""

    folder: Path
    target: Path

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest over all files, then put the folder in the target's place at once."""
        self._seal(manifest)
        if self.target.exists():
            _exchange(self.folder, self.target)  # the staging folder now holds the old artifact
        else:
            self.folder.rename(self.target)

    def keep_failed(self, manifest: Manifest) -> Path:
        """Keep everything as `<target>.failed`, for `loraexport verify` to repeat the failure."""
        self._seal(manifest)
        failed = self.target.with_name(self.target.name + ".failed")
        if failed.exists():
            shutil.rmtree(failed)
        self.folder.rename(failed)
        return failed

    def _seal(self, manifest: Manifest) -> None:
        files = {
            str(path.relative_to(self.folder).as_posix()): FileEntry(
                digest_file(path), path.stat().st_size
            )
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST_FILE
        }
        text = replace(manifest, files=files).to_json()
        (self.folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


@contextmanager
def staging(out: Path, name: str) -> Iterator[Staging]:
    """A fresh staging folder beside `out/name`, under a lock that one build at a time holds.

    Raises:
        BuildBusyError: another build of this artifact is running.
        UsageError: `out/name` exists and is no artifact.
    """
    target = out / name
    out.mkdir(parents=True, exist_ok=True)
    if target.exists() and not (target / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{target} exists and is no artifact (it has no {MANIFEST_FILE}); it is not"
            " overwritten. Move it away, or choose another --out"
        )
    with (out / f".{name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BuildBusyError(
                f"another build of {target} is running; wait for it, or build with another --out"
            ) from error
        for left in out.glob(f".{name}.staging-*"):  # of builds that were killed
            shutil.rmtree(left)
        folder = out / f".{name}.staging-{os.getpid()}"
        folder.mkdir()
        try:
            yield Staging(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def mark_verified(folder: Path, manifest: Manifest, parity: ParitySummary) -> None:
    """Replace the parity summary of a published artifact, atomically."""
    temporary = folder / f".{MANIFEST_FILE}.{os.getpid()}"
    temporary.write_text(replace(manifest, parity=parity).to_json(), encoding="utf-8")
    temporary.replace(folder / MANIFEST_FILE)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step of the kernel."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        failed = libc.renamex_np(*paths, _RENAME_SWAP)
    else:
        failed = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    if failed:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL):
            raise UsageError(
                f"{second}: this file system cannot swap two folders in one step; remove the old"
                " artifact first, or choose another --out"
            )
        raise OSError(code, os.strerror(code), str(second))
