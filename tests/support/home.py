"""One home for builds: an artifact is built once a test run, and all workers read it."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from loraexport.errors import BaseModelError
from loraexport.hf.sources import resolve_directory
from loraexport.spec.reader import read_spec


class Home:
    """The folder of a test run. What it gives is to be read, or copied before it is changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stamps: dict[Path, Any] = {}

    @classmethod
    def of_run(cls, factory: pytest.TempPathFactory) -> "Home":
        """The home that all workers of pytest-xdist share, or that of the only process."""
        folder = factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent
        root = folder / "home"
        root.mkdir(exist_ok=True)
        return cls(root)

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of a name, filled by `make` where no worker has done so."""
        folder = self.root / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            done = Path(f"{folder}.done")
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    def project(self, write: Callable[..., object], *arguments: Any, **changes: Any) -> Path:
        """The folder that `write(folder, *arguments, **changes)` fills."""
        said = json.dumps([write.__module__, arguments, changes], sort_keys=True)
        name = f"{write.__name__}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
        return self.once(name, lambda folder: write(folder, *arguments, **changes))

    def artifact(self, write: Callable[..., object], *arguments: Any, **changes: Any) -> Path:
        """The artifact of such a project's `spec.yaml`; the project's files lie in `../..`."""
        folder = self.project(write, *arguments, **changes)
        return self.build(folder / "spec.yaml", folder / "artifacts")

    def build(self, spec: Path, out: Path | None = None) -> Path:
        """The artifact of a spec: one for equal specs, bases and adapters, wherever they lie.

        Args:
            out: where it is built, if nobody has built an equal one.
        """
        key = digest_inputs(spec)
        note = self.root / f"artifact-{key}.json"
        with FileLock(f"{note}.lock"):
            if not note.exists():
                import torch

                from loraexport.pipeline.build import build

                torch.set_num_threads(1)
                artifact, _ = build(spec, out or self.root / key)
                note.write_text(json.dumps({"artifact": str(artifact), "files": stamp(artifact)}))
        made = json.loads(note.read_text())
        self._stamps[Path(made["artifact"])] = made["files"]
        return Path(made["artifact"])

    def check(self) -> None:
        """Fail if an artifact is no longer what its build left behind."""
        for artifact, files in self._stamps.items():
            assert stamp(artifact) == files, f"a test changed {artifact}, which others read"


def stamp(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    }


def digest_inputs(path: Path) -> str:
    """One sha256 of a resolved spec and of the content of its base and adapters."""
    spec = read_spec(path)
    sources = [adapter.path for adapter in spec.adapters]
    if spec.base.path is not None:
        sources.append(spec.base.path)
    total = hashlib.sha256(spec.digest().encode())
    for source in sources:
        place = path.parent / source
        with suppress(BaseModelError):  # a graph is a file
            place = resolve_directory(source, path.parent, BaseModelError)
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.is_file():
                total.update(file.relative_to(place).as_posix().encode())
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]
