"""Builds in processes of their own, and what they leave behind; the child of a fork."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import ClosedError
from support.waiting import DEADLINE


def start_build(spec: Path, out: Path, **environment: str) -> "subprocess.Popen[str]":
    """`loraexport build` as a process of its own; its progress is on stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", "loraexport", "build", str(spec), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )


def read_until(process: "subprocess.Popen[str]", stage: str) -> None:
    """Read the progress up to the line of a stage."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if f": {stage}" in line:
            return
    raise AssertionError(f"never came to {stage!r}: {seen}")


def left_over(out: Path) -> list[str]:
    """What a build should not leave beside its artifacts."""
    return sorted(path.name for path in out.iterdir() if "staging" in path.name)


def check_whole(folder: Path) -> Manifest:
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    return manifest


def refused_in_a_child(
    calls: Mapping[str, Callable[[], object]],
    close: Callable[[], object],
    *locks: AbstractContextManager[Any],
) -> list[str]:
    """What the child of a fork says of each call: its name, if it was a ClosedError; then `closed`.

    A thread of the parent holds the locks, which nobody opens in the child.
    """
    locked, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as held:
            for lock in locks:
                held.enter_context(lock)
            locked.set()
            assert leave.wait(DEADLINE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(DEADLINE)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while threads run
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(int(DEADLINE))  # which ends a child that hangs
                for name, call in calls.items():
                    with suppress(ClosedError):
                        call()
                        name = f"{name}, which nobody refused"
                    os.write(writer, f"{name}\n".encode())
                close()
                os.write(writer, b"closed\n")
            finally:
                os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        lines = said.read().splitlines()
    os.waitpid(child, 0)
    leave.set()
    thread.join(DEADLINE)
    return lines
