"""The package's two functions, and what a build says where a compiler is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import loraexport_kernels

KERNELS = Path(__file__).resolve().parents[2] / "runtime/kernels"


@pytest.mark.parametrize(
    ("capability", "can"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_supported(capability: tuple[int, int], can: bool) -> None:
    assert loraexport_kernels.supported(capability) is can


def test_sources_have_no_library() -> None:
    with pytest.raises(FileNotFoundError, match=r"libloraexport_kernels\.so is missing: build it"):
        loraexport_kernels.library_path()


def build_without(folder: Path, **environment: str) -> str:
    """What a build says where PATH leads nowhere."""
    env = {"PATH": str(folder), "CUDA_HOME": str(folder), **environment}
    command = [sys.executable, "-I", str(KERNELS / "compile_kernels.py"), str(folder / "out.so")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not (folder / "out.so").exists()
    return done.stderr


def test_without_nvcc(tmp_path: Path) -> None:
    said = build_without(tmp_path)
    assert said.startswith("loraexport-kernels: no nvcc: install CUDA 13's toolkit or `pip install")
    assert "LORAEXPORT_KERNELS_CPU=1" in said


def test_with_an_old_nvcc(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    nvcc.chmod(0o755)
    said = build_without(tmp_path, PATH=f"{tmp_path}:{os.defpath}")
    assert "nvcc is of CUDA 12.4: 13.0 or later is needed" in said


def test_without_a_compiler(tmp_path: Path) -> None:
    said = build_without(tmp_path, LORAEXPORT_KERNELS_CPU="1")
    assert said == "loraexport-kernels: no C++ compiler: install g++, or name one in CXX\n"
