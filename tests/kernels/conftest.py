"""The libraries of runtime/kernels, each compiled once a test run."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.home import Home

KERNELS = Path(__file__).resolve().parents[2] / "runtime/kernels"
EMULATED = Path(__file__).parent / "emulated"


def compiler() -> str:
    """A C++ compiler, or the test is skipped."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


def compile_kernels(output: Path, **environment: str) -> None:
    command = [sys.executable, str(KERNELS / "compile_kernels.py"), str(output)]
    subprocess.run(command, env={**os.environ, **environment}, check=True)


@pytest.fixture(scope="session")
def library(home: Home) -> Path:
    """With the CPU kernels alone."""
    compiler()
    made = home.once(
        "kernels-cpu", lambda to: compile_kernels(to / "library.so", LORAEXPORT_KERNELS_CPU="1")
    )
    return made / "library.so"


@pytest.fixture(scope="module")
def installed(home: Home, library: Path) -> Iterator[None]:
    """The package as it is installed, with its CPU kernels."""

    def install(folder: Path) -> None:
        shutil.copytree(KERNELS / "loraexport_kernels", folder / "loraexport_kernels")
        shutil.copyfile(library, folder / "loraexport_kernels/libloraexport_kernels.so")

    folder = home.once("installed-kernels", install)
    sys.modules.pop("loraexport_kernels", None)  # of another test's, which is not built
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("loraexport_kernels", None)


@pytest.fixture(scope="session")
def cuda_library(home: Home) -> Path:
    """With the CUDA kernels too, of one target; it loads on any machine."""
    home_of_cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if shutil.which("nvcc") is None and not (home_of_cuda / "bin/nvcc").is_file():
        pytest.skip("needs nvcc")
    made = home.once(
        "kernels-cuda", lambda to: compile_kernels(to / "library.so", LORAEXPORT_KERNELS_ARCHS="90")
    )
    return made / "library.so"


@pytest.fixture(scope="session")
def emulated(home: Home) -> Path:
    """The CUDA sources, compiled for the emulation in tests/kernels/emulated."""

    def make(folder: Path) -> None:
        folder.mkdir()
        command = [compiler(), "-O2", "-std=c++20", "-fPIC", "-shared", "-Wno-class-memaccess"]
        command += ["-DLORAEXPORT_CUDA", "-DLORAEXPORT_EMULATED"]
        command += [f"-I{EMULATED}", f"-I{KERNELS / 'csrc'}", "-o", str(folder / "library.so")]
        command += [str(EMULATED / "emulated.cc"), str(KERNELS / "bench/plain.cc")]
        command += [str(KERNELS / "csrc/cpu.cc"), "-x", "c++"]
        names = ("route", "shrink", "expand", "site")
        subprocess.run([*command, *(f"{KERNELS}/csrc/{name}.cu" for name in names)], check=True)

    return home.once("kernels-emulated", make) / "library.so"


@pytest.fixture(scope="session")
def check(emulated: Path) -> ModuleType:
    """runtime/kernels/bench/check.py, which runs beside its own neighbours alone."""
    sys.path.insert(0, str(KERNELS / "bench"))
    try:
        spec = importlib.util.spec_from_file_location("check", KERNELS / "bench/check.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(KERNELS / "bench"))
    return module
