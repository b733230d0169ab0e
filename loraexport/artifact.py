"""A folder that is whole or not there: staging beside the target, then one atomic switch."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from loraexport_runtime.adapters.files import REST_SECONDS
from loraexport_runtime.contract.files import (
    MANIFEST_FILE,
    FileEntry,
    Stamp,
    digest_file,
    stamp_of,
)
from loraexport_runtime.contract.foreign import reason
from loraexport_runtime.contract.json_values import dump
from loraexport_runtime.contract.manifest import FORMAT_VERSION, Manifest, ParitySummary
from loraexport_runtime.contract.seal import DIGEST_FILE, digest_line
from loraexport_runtime.errors import MAX_QUOTED, LoraexportError, shorten

from .errors import BuildBusyError, DiskFullError, ExportError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 64 * 1024
"""Bytes left, with which a file system counts as full."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux, renameat2
_RENAME_SWAP = 2  # macOS, renamex_np


@dataclass(frozen=True)
class Staging:
    """A build in progress: nobody sees `folder` before `publish`."""

    folder: Path
    target: Path
    _listed: dict[str, tuple[Stamp, FileEntry]] = field(default_factory=dict)
    """What was hashed, by path."""

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest over all files, then put the folder in the target's place at once."""
        self._seal(manifest)
        self._put_at(self.target)

    def keep_failed(self, manifest: Manifest) -> Path:
        """Keep everything as `<target>.failed`, for `loraexport verify` to repeat the failure."""
        self._seal(manifest)
        self._put_at(_failed(self.target))
        return _failed(self.target)

    def _put_at(self, place: Path) -> None:
        if place.exists():
            _exchange(self.folder, place)  # the staging folder now holds what was there
        else:
            self.folder.rename(place)

    def list_files(self, manifest: Manifest) -> Manifest:
        """The manifest with every file as it is now: a session reads no others.

        A file is hashed once: what was listed before is compared by its stamp.

        Raises:
            UsageError: one that was listed before has changed, or has gone.
        """
        files = {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST_FILE
        }
        self._wait_for_rest(files.values())
        for name, path in files.items():
            stamp = stamp_of(path.stat())
            if name not in self._listed:
                self._listed[name] = stamp, FileEntry(digest_file(path), path.stat().st_size)
            if self._listed[name][0] != stamp_of(path.stat()):
                raise self._changed(name)
        if gone := sorted(self._listed.keys() - files.keys()):
            raise self._changed(gone[0])
        return replace(manifest, files={name: self._listed[name][1] for name in files})

    def _wait_for_rest(self, files: Iterable[Path]) -> None:
        """Let the file system's clock go on, so that a later write has another time."""
        newest = max((path.stat().st_ctime for path in files), default=0.0)
        if 0 <= (age := time.time() - newest) < REST_SECONDS:
            time.sleep(REST_SECONDS - age)

    def _changed(self, name: str) -> UsageError:
        return UsageError(
            f"{self.folder / name}: something changed it while it was proven, so that nothing is"
            " published; build again, and let nothing else write there"
        )

    def _seal(self, manifest: Manifest) -> None:
        content = self.list_files(manifest).to_json().encode()
        (self.folder / MANIFEST_FILE).write_bytes(content)
        (self.folder / DIGEST_FILE).write_text(digest_line(content), encoding="utf-8")


@contextmanager
def staging(out: Path, name: str) -> Iterator[Staging]:
    """A fresh staging folder beside `out/name`, under a lock that one build at a time holds.

    Raises:
        BuildBusyError: another build of this artifact is running.
        UsageError: `out/name` exists and is no artifact, or `out` cannot be written.
        DiskFullError: `out`, or the folder of temporary files, is full.
    """
    target = out / name
    try:
        for path in (target, _failed(target)):
            _require_replaceable(path)
    except OSError as error:
        shown = shorten(str(out), MAX_QUOTED)
        raise UsageError(
            f"--out {shown}: no path to write to ({error.strerror}); choose another"
        ) from error
    with _open_lock(out, name) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildBusyError(
                f"another build of {target} is running; wait for it, or build with another --out"
            ) from error
        for abandoned in out.glob(f".{name}.staging-*"):  # of builds that were killed
            if abandoned.name.removeprefix(f".{name}.staging-").isdigit():
                _remove(abandoned)
        folder = out / f".{name}.staging-{os.getpid()}"
        try:
            folder.mkdir()
            yield Staging(folder, target)
        except Exception as error:
            _raise_if_full(error, folder)  # while what was written is there still
            raise
        finally:
            try:
                shutil.rmtree(folder, ignore_errors=True)
            except BaseException:  # a signal, which may not leave half of it
                shutil.rmtree(folder, ignore_errors=True)
                raise


def _raise_if_full(error: Exception, folder: Path) -> None:
    """Raise DiskFullError if that is what an error means, or the error behind it.

    Libraries say only that a write failed, so that the room which is left has to tell.
    """
    causes: list[BaseException] = [error]
    while (behind := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(behind)
    said = [cause for cause in causes if isinstance(cause, OSError) and cause.errno in _FULL]
    places = [folder, Path(tempfile.gettempdir())]
    full = [place for place in places if place.exists() and shutil.disk_usage(place).free < _ROOM]
    is_explained = isinstance(error, LoraexportError) and not isinstance(error, ExportError)
    if not said and (is_explained or not full):
        return
    filename = next((cause.filename for cause in said if cause.filename), None)
    place = filename or (full or places)[0]
    raise DiskFullError(
        f"{place}: no space left on the device; nothing was published. Free some, or choose another"
        " --out (or TMPDIR, for a temporary file)"
    ) from error


def _remove(leftover: Path) -> None:
    """Remove a folder, or what stands in its place; a link goes, and not what it leads to."""
    try:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    except OSError as error:
        raise UsageError(
            f"{leftover}: what an earlier build left behind cannot be removed"
            f" ({error.strerror or error}); remove it, or choose another --out"
        ) from error


def _failed(target: Path) -> Path:
    return target.with_name(target.name + ".failed")


def _require_replaceable(path: Path) -> None:
    """Raise UsageError unless the path is free or an artifact, which a build may replace."""
    if path.is_symlink():
        raise UsageError(
            f"{path} is a symbolic link; a build would replace the link and not what it leads to."
            " Remove it, or choose as --out the folder that it leads to"
        )
    if path.exists() and not (path / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{path} exists and is no artifact (it has no {MANIFEST_FILE}); it is not"
            " overwritten. Move it away, or choose another --out"
        )


def _open_lock(out: Path, name: str) -> TextIO:
    if name.endswith(".failed"):
        raise UsageError(
            f"{out / name}: a folder of this name is kept for the report of a build that fails;"
            " choose another name in the spec"
        )
    file = out / f".{name}.lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Without waiting, as a FIFO would for a reader; and the lock itself, not what it leads to.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
        lock = os.fdopen(os.open(file, flags | os.O_CLOEXEC, 0o666), "a")
        if stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
            return lock
        lock.close()
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    except (OSError, ValueError) as error:  # ValueError: a NUL
        _raise_if_full(error, out)
        shown, why = shorten(str(out), MAX_QUOTED), shorten(str(error), 2 * MAX_QUOTED)
        raise UsageError(f"--out {shown}: cannot be written ({why}); choose another") from error


def mark_verified(folder: Path, manifest: Manifest, parity: ParitySummary) -> None:
    """Replace the parity summary of a published artifact, atomically.

    Args:
        manifest: the artifact's, as it was when it was verified.

    Raises:
        UsageError: a build has replaced the artifact since, or it cannot be written.
        DiskFullError: there is no room; its parity is as it was.
    """
    if Manifest.read(folder).to_json() != manifest.to_json():  # as text: NaN is not NaN
        raise UsageError(f"{folder}: a build replaced it while it was verified; verify it again")
    before = (folder / MANIFEST_FILE).read_bytes()
    # In the format that it has: another would say of the graphs what nobody has looked at.
    data = json.loads(before) | {"parity": dump(ParitySummary, parity)}
    after = (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    is_sealed = manifest.format_version >= FORMAT_VERSION
    if is_sealed:  # Both digests stand there until the manifest is the new one.
        write_whole(folder / DIGEST_FILE, (digest_line(before) + digest_line(after)).encode())
    write_whole(folder / MANIFEST_FILE, after)
    if is_sealed:
        write_whole(folder / DIGEST_FILE, digest_line(after).encode())


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, or leave what was there: beside it first, then in its place at once.

    Raises:
        DiskFullError: there is no room.
        UsageError: nothing can be written there.
    """
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        staged.write_bytes(content)
        staged.replace(file)
    except OSError as error:
        raise cannot_write(file, error) from error
    finally:
        with suppress(OSError):  # what was written in part
            staged.unlink(missing_ok=True)


def cannot_write(place: Path, error: OSError) -> LoraexportError:
    """What to raise where the system lets nobody write."""
    if error.errno in _FULL:
        return DiskFullError(
            f"{place}: no space left on the device; it was not written. Free some, or choose"
            " another place"
        )
    why = "permission denied" if isinstance(error, PermissionError) else reason(error)
    return UsageError(f"{place}: cannot be written ({why}); choose another place")


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
