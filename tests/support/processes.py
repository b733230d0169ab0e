"""Builds in processes of their own, and what they leave behind."""

import os
import subprocess
import sys
from pathlib import Path

from loraexport_runtime.contract.manifest import Manifest


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
