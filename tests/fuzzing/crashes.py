"""Builds that are killed, and builds onto a disk that fills up: what is left on it."""

import ctypes
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from support.builds import write_one_layer, write_small
from support.processes import check_whole, left_over

from loraexport.errors import DiskFullError
from loraexport.pipeline.build import build
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.manifest import Manifest

from .target import ChangedNumbersError, Target, UnavailableError

_WRITERS = (write_one_layer, write_one_layer, write_one_layer, write_small)
"""The second takes some times as long as the first: it exports ONNX too."""
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_ROOT_OF_USER = "0 {} 1"
_PRIVATE = 1 << 18 | 1 << 14
"""MS_PRIVATE | MS_REC: what is mounted here is seen by nobody else."""


class Kills(Target):
    """A build over an artifact, killed at a moment that is drawn; then the next build.

    Afterwards the old artifact or the new one is there, whole, and the next build leaves nothing
    but its own.
    """

    warm_ups = 0

    def prepare(self) -> None:
        self.seconds: dict[Path, float] = {}
        for write in set(_WRITERS):
            folder = self.home / write.__name__
            folder.mkdir()
            write(folder)
            for seed in (7, 8):
                write(folder, parity={"seed": seed}).rename(folder / f"next-{seed}.yaml")
            write(folder)
            start = time.monotonic()
            _in_child(lambda folder=folder: build(folder / "spec.yaml", folder / "out"))
            self.seconds[folder] = time.monotonic() - start

    def attack(self, draw: random.Random) -> str:
        folder = self.home / draw.choice(_WRITERS).__name__
        share = draw.random()
        self.said = f"{folder.name}, killed at {share:.3f} of a build"
        out = self.fresh(folder / "out")
        killed, last = folder / "next-7.yaml", folder / "next-8.yaml"
        digests = [read_spec(spec).digest() for spec in (killed, last)]
        before = Manifest.read(out / "tiny").spec_digest
        child = _fork(lambda: build(killed, out))
        time.sleep(share * self.seconds[folder])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if check_whole(out / "tiny").spec_digest not in (before, digests[0]):
            raise ChangedNumbersError("neither the old artifact nor the new one")
        start = time.monotonic()
        _in_child(lambda: build(last, out))
        self.seconds[folder] = time.monotonic() - start
        if check_whole(out / "tiny").spec_digest != digests[1]:
            raise ChangedNumbersError("the next build has published nothing")
        _require_nothing_else(out)
        return self.said


class Disks(Target):
    """A build onto a disk of a size that is drawn, with an artifact on it or without."""

    warm_ups = 0

    def prepare(self) -> None:
        self.folder = self.home / "project"
        self.folder.mkdir()
        write_small(self.folder)
        self.artifact, _ = build(self.folder / "spec.yaml", self.home / "first")
        write_small(self.folder, parity={"seed": 7})
        files = [path for path in self.artifact.rglob("*") if path.is_file()]
        self.pages = sum(-(-file.stat().st_size // 4096) + 1 for file in files)
        (self.home / "disk").mkdir()
        try:
            _in_child(lambda: _mount(self.home / "disk", 64))
        except OSError as error:
            raise UnavailableError(f"no file system can be mounted here: {error}") from error

    def attack(self, draw: random.Random) -> str:
        has_old = draw.random() < 0.5
        pages = draw.randrange(8, 2 * self.pages)
        self.said = f"{pages} pages free, {'over an artifact' if has_old else 'nothing there'}"
        _in_child(lambda: self._build(self.home / "disk", has_old, pages))
        return self.said

    def _build(self, out: Path, has_old: bool, pages: int) -> None:
        """In a process that alone sees the disk."""
        _mount(out, pages + (self.pages if has_old else 0))
        if has_old:
            shutil.copytree(self.artifact, out / "tiny")
        try:
            build(self.folder / "spec.yaml", out)
        except DiskFullError:
            if (out / "tiny").exists() != has_old:
                raise ChangedNumbersError("the artifact is gone, or another is there") from None
            if has_old and check_whole(out / "tiny") != Manifest.read(self.artifact):
                raise ChangedNumbersError("the artifact is another") from None
            if left_over(out):
                raise ChangedNumbersError(f"{left_over(out)} are left") from None
            raise
        check_whole(out / "tiny")
        _require_nothing_else(out)


def _require_nothing_else(out: Path) -> None:
    names = sorted(path.name for path in out.iterdir())
    if names != [".tiny.lock", "tiny"]:
        raise ChangedNumbersError(f"{names} are left")


def _fork(work: Callable[[], object], note: int | None = None) -> int:
    """The id of a process that does the work and ends; what it raises goes into a pipe."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        if note is not None:
            os.write(note, f"{type(error).__name__}\n{error}\n{traceback.format_exc()}".encode())
    finally:
        os._exit(1)


_RAISED = {kind.__name__: kind for kind in (DiskFullError, ChangedNumbersError, OSError)}


def _in_child(work: Callable[[], object]) -> None:
    """Do the work in a process of its own; raise here what it raises there."""
    read, write = os.pipe()
    child = _fork(work, write)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if said:
        name, _, rest = said.partition("\n")
        raise _RAISED.get(name, RuntimeError)(f"{rest}")


def _mount(folder: Path, pages: int) -> None:
    """An empty file system of so many pages of 4 KiB, which this process alone sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, is_root = os.getuid(), os.geteuid() == 0
    flags = _CLONE_NEWNS if is_root else _CLONE_NEWNS | _CLONE_NEWUSER
    _require_done(libc.unshare(flags))
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(_ROOT_OF_USER.format(user))
    _require_done(libc.mount(b"none", b"/", None, _PRIVATE, None))
    options = f"size={pages * 4}k".encode()
    _require_done(libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, options))


def _require_done(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
