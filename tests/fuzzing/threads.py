"""Threads that run batches while adapters are loaded, replaced and unloaded beside them.

Takes an artifact of `write_tenants`; each row is held to the same row run alone.
"""

import random
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from support.adapters import write_adapter

import loraexport_runtime as lr

TOLERANCE = 1e-4
"""Of a row beside the same row alone; two adapters differ by a hundred times that at least."""
LAYERS = ("qkv", "up")
_SITES = {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)}
_CARRIED = ("sql", "chat", "spare")
_NUM_VERSIONS = 6
_NUM_VECTORS = 48
_MAX_FINDINGS = 20


def write_versions(folder: Path) -> Path:
    """The adapters that are loaded, a folder each."""
    for version in range(_NUM_VERSIONS):
        write_adapter(folder / f"{version}", _SITES, rank=2 + version, seed=100 + version)
    return folder


@dataclass
class Result:
    """What the threads came to."""

    rows: int = 0
    wrong: int = 0
    """Rows that differ from the same row alone."""
    loads: int = 0
    """New adapters, replacements, and carried ones read again; unloads are not counted."""
    unloads: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of the process: `start`, `warm` once the warm-up's rows were run, `end`."""
    findings: list[str] = field(default_factory=list)
    """Wrong rows, errors, and threads that are stuck; the first twenty."""


def run_threads(
    artifact: Path,
    folder: Path,
    rows: int,
    warm_up: int,
    num_threads: int = 16,
    patience_s: float = 60.0,
) -> Result:
    """Run so many rows in all.

    Args:
        folder: of `write_versions`.
        warm_up: rows after which memory counts as warm.
        patience_s: what a run or a load may wait for a slot, and all threads may take for a row.
    """
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((_NUM_VECTORS, 32)).astype(np.float32)
    versions = sorted(folder.iterdir())
    alone = _run_alone(artifact, versions, vectors)
    with lr.load_layers(artifact, threads=1) as session:
        stress = _Stress(session, vectors, alone, versions, num_threads, patience_s)
        return stress.run(rows, warm_up)


def _run_alone(
    artifact: Path, versions: Sequence[Path], vectors: np.ndarray
) -> dict[str, np.ndarray]:
    """`layer/adapter` -> what each vector gives in a batch of its own, [vectors, out]."""
    expected = {}
    for adapter in (None, *_CARRIED, *versions):
        with lr.load_layers(artifact, threads=1) as session:
            name = None if adapter is None else str(adapter)
            if isinstance(adapter, Path):
                session.load_adapter(str(adapter), adapter)
            for layer in LAYERS:
                expected[f"{layer}/{name}"] = np.concatenate(
                    [session[layer].run(x[None], segments=[(name, 1)]) for x in vectors]
                )
    return expected


class _Stress:
    def __init__(
        self,
        session: lr.LayersSession,
        vectors: np.ndarray,
        alone: Mapping[str, np.ndarray],
        versions: Sequence[Path],
        num_threads: int,
        patience_s: float,
    ) -> None:
        self.session = session
        self.vectors = vectors
        self.alone = alone
        self.versions = versions
        self.patience_s = patience_s
        self.tenants = [f"tenant-{index}" for index in range(num_threads)]
        self.results = [Result() for _ in self.tenants]
        self.done = threading.Event()

    def run(self, rows: int, warm_up: int) -> Result:
        whole = Result(memory={"start": resident_bytes()})
        threads = [
            threading.Thread(target=self._work, args=(index,), daemon=True)
            for index in range(len(self.tenants))
        ]
        for thread in threads:
            thread.start()
        moved = time.monotonic()
        while whole.rows < rows:
            self.done.wait(0.02)
            count = sum(result.rows for result in self.results)
            now = time.monotonic()
            moved = now if count > whole.rows else moved
            whole.rows = count
            if count >= warm_up:
                whole.memory.setdefault("warm", resident_bytes())
            if self.done.is_set() or now - moved > self.patience_s:
                break
        whole.memory["end"] = resident_bytes()
        self.done.set()
        deadline = time.monotonic() + 2 * self.patience_s
        for tenant, thread in zip(self.tenants, threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                whole.findings.append(f"{tenant} is stuck: {_place(thread)}")
        whole.rows = sum(result.rows for result in self.results)
        for result in self.results:
            whole.wrong += result.wrong
            whole.loads += result.loads
            whole.unloads += result.unloads
            whole.findings += result.findings
        del whole.findings[_MAX_FINDINGS:]
        return whole

    def _work(self, index: int) -> None:
        """Change an adapter of this thread's own, or read a carried one again; run; compare."""
        draw, result, own = random.Random(index), self.results[index], self.tenants[index]
        loaded: Path | None = None
        try:
            while not self.done.is_set() and not result.findings:
                chance = draw.random()
                if chance < 0.02 and loaded:
                    self.session.unload_adapter(own)
                    loaded = None
                    result.unloads += 1
                elif chance < 0.2:
                    loaded = draw.choice(self.versions)
                    self.session.load_adapter(own, loaded, timeout=self.patience_s)
                    result.loads += 1
                elif chance < 0.22:
                    self.session.load_adapter(draw.choice(_CARRIED), timeout=self.patience_s)
                    result.loads += 1
                self._run_batch(draw, result, own, loaded)
        except Exception as error:
            result.findings.append(f"{own}: {type(error).__name__}: {error}")
        finally:
            if result.findings:
                self.done.set()

    def _run_batch(
        self, draw: random.Random, result: Result, own: str, loaded: Path | None
    ) -> None:
        names: list[str | None] = [own] if loaded else []
        other = draw.choice(self.tenants)
        if other != own and draw.random() < 0.5:
            names.append(other)
        names = [None, *[*names, draw.choice(_CARRIED)][: self.session.manifest.num_slots]]
        draw.shuffle(names)
        lengths = [draw.randrange(1, 17) for _ in names]
        rows = np.array([draw.randrange(_NUM_VECTORS) for _ in range(sum(lengths))])
        layer = draw.choice(LAYERS)
        segments = list(zip(names, lengths, strict=True))
        try:
            y = self.session[layer].run(
                self.vectors[rows], segments=segments, timeout=self.patience_s
            )
        except lr.UnknownAdapterError:
            if other in names:  # its thread has not loaded it yet, or unloaded it
                return
            raise
        result.rows += len(rows)
        start = 0
        for name, length in segments:
            part = slice(start, start + length)
            contents = [str(loaded)] if name == own else [str(name)]
            if name == other:  # any version, but all rows the same one
                contents = [str(version) for version in self.versions]
            errors = [
                np.abs(y[part] - self.alone[f"{layer}/{content}"][rows[part]]).max(axis=1)
                for content in contents
            ]
            best = min(errors, key=lambda error: (error > TOLERANCE).sum())
            wrong = int((~(best <= TOLERANCE)).sum())
            if wrong:
                result.wrong += wrong
                result.findings.append(
                    f"{own}: {wrong} of {length} rows of {name!r} at {layer!r} are off by up to"
                    f" {best.max():.2e}"
                )
            start += length


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _place(thread: threading.Thread) -> str:
    """The function and line that a thread is at."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "nowhere"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
