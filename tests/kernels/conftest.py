"""The library with the CPU kernels, compiled once a test run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.home import Home

KERNELS = Path(__file__).resolve().parents[2] / "runtime/kernels"


def compile_cpu(folder: Path) -> None:
    subprocess.run(
        [sys.executable, str(KERNELS / "compile.py"), str(folder / "library.so")],
        env={**os.environ, "LORAEXPORT_KERNELS_CPU": "1"},
        check=True,
    )


@pytest.fixture(scope="session")
def library(home: Home) -> Path:
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        pytest.skip("needs a C++ compiler")
    return home.once("kernels", compile_cpu) / "library.so"
