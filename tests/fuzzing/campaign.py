"""Seeds -> outcomes, each tried in a worker that a hang or a crash does not outlive."""

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .target import UnavailableError

TESTS = Path(__file__).resolve().parents[1]
FINE = ("refused", "accepted")
_SAID = 3_000
_WAITS = 12
"""So many times the seconds may pass while others have the processors."""
_START_S = 300
"""For imports and the builds of the originals."""


@dataclass(frozen=True)
class Finding:
    """A case that ended otherwise than refused or accepted."""

    target: str
    seed: int
    outcome: str
    """`hang`, `died`, `untyped`, `memory`, `changed` or `code`."""
    said: str
    detail: str


@dataclass
class Result:
    """What a target's seeds came to."""

    target: str
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def add(self, seed: int, outcome: str, said: str, detail: str) -> None:
        self.counts[outcome] += 1
        if outcome not in FINE:
            self.findings.append(Finding(self.target, seed, outcome, said, detail))


def run_campaign(
    target: str, seeds: Iterable[int], hang_s: float, deadline: float = float("inf")
) -> Result:
    """Try seeds in turn.

    Args:
        hang_s: what a case may take of a processor; what waits is given up after _WAITS times that.
        deadline: of time.monotonic(); no case begins after it.

    Raises:
        UnavailableError: this machine cannot try them, and why.
    """
    result = Result(target)
    folder = Path(tempfile.mkdtemp(prefix=f"loraexport-{target}-"))
    worker: _Worker | None = None
    try:
        for seed in seeds:
            if time.monotonic() > deadline:
                break
            worker = worker or _Worker(target, folder / f"{seed}")
            reply = worker.ask(seed, hang_s)
            if reply is None:
                outcome = "died" if worker.process.poll() is not None else "hang"
                worker.stop()
                result.add(seed, outcome, "", worker.last_words())
                worker = None
            else:
                result.add(seed, reply["outcome"], reply["said"], reply["detail"])
    finally:
        if worker:
            worker.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return result


class _Worker:
    def __init__(self, target: str, folder: Path) -> None:
        self._log = Path(f"{folder}.log")
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        here = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fuzzing.worker", target, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | here,
            )
        ready = self._read(_START_S)
        if ready is None or ready["outcome"] != "ready":
            self.stop()
            if ready is not None:
                raise UnavailableError(ready["said"])
            raise RuntimeError(f"the worker of {target!r} did not start: {self.last_words()}")

    def ask(self, seed: int, seconds: float) -> dict[str, Any] | None:
        """The outcome; None: it hangs, or has died."""
        try:
            _pipe(self.process.stdin).write(f"{seed}\n")
            _pipe(self.process.stdin).flush()
        except BrokenPipeError:
            return None
        return self._read(seconds)

    def last_words(self) -> str:
        """The end of what it has written to stderr."""
        return self._log.read_text(errors="replace")[-_SAID:]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):  # a seed that nobody reads any more
                _pipe(pipe).close()

    def _read(self, seconds: float) -> dict[str, Any] | None:
        begin, used = time.monotonic(), self._cpu_s()
        with selectors.DefaultSelector() as selector:
            selector.register(_pipe(self.process.stdout), selectors.EVENT_READ)
            while not selector.select(min(seconds, 1)):
                waits = time.monotonic() - begin > seconds * _WAITS
                if waits or self._cpu_s() - used > seconds:
                    return None
        line = _pipe(self.process.stdout).readline()
        if not line:
            self.process.wait()
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _cpu_s(self) -> float:
        """What it has used of processors, with the children that it has waited for."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
