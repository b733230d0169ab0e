"""What the import asks for: a platform, and one onnxruntime of either distribution."""

import importlib.metadata
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from loraexport_runtime.device import installed

ROOT = Path(__file__).parents[3]
IMPORT = "import loraexport_runtime"


def run(program: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def only(monkeypatch: pytest.MonkeyPatch, names: Collection[str]) -> None:
    """As if these distributions of onnxruntime were installed, and no other."""

    def distribution(name: str) -> Any:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "distribution", distribution)


def test_windows() -> None:
    done = run(f"import sys; sys.platform = 'win32'; {IMPORT}")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "ImportError: loraexport-runtime does not support Windows; use Linux, or WSL 2 or a Linux"
        " container on Windows"
    )


def test_no_onnxruntime() -> None:
    done = run(f"import sys; sys.modules['onnxruntime'] = None; {IMPORT}")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "ImportError: loraexport-runtime needs onnxruntime: pip install onnxruntime-gpu for CUDA on"
        " Linux x86-64, or pip install onnxruntime for the CPU"
    )


@pytest.mark.parametrize("name", [*installed.DISTRIBUTIONS, "onnxruntime-of-our-own"])
def test_one_of_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    only(monkeypatch, [name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        installed.check_installed()


def test_both(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, installed.DISTRIBUTIONS)
    text = (
        "onnxruntime and onnxruntime-gpu are both installed, into the same folder, .* pip uninstall"
        " onnxruntime onnxruntime-gpu, then install the one that you want"
    )
    with pytest.warns(RuntimeWarning, match=text):
        installed.check_installed()


def test_the_warning_names_who_imports() -> None:
    both = "import importlib.metadata as m; m.distribution = lambda name: None"
    done = subprocess.run(
        [sys.executable, "-c", f"{both}\n{IMPORT}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr.startswith("<string>:2: RuntimeWarning: onnxruntime and onnxruntime-gpu are")


def test_what_the_import_brings() -> None:
    """Not onnxruntime-genai, an extra that is slow to load; and no line of output."""
    done = run(
        f"import sys; {IMPORT} as lr; lr.load_generator, lr.TextGenerator, lr.Completion, lr.Piece;"
        " assert 'onnxruntime_genai' not in sys.modules;"
        " assert all(hasattr(lr, name) for name in lr.__all__)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_a_service_on_the_cpu_installs() -> None:
    """Everything that the runtime needs, with the CPU's onnxruntime in place of CUDA's."""
    runtime = ROOT / "runtime"
    project = tomllib.loads((runtime / "pyproject.toml").read_text())["project"]
    needed = {line.partition(";")[0].strip() for line in project["dependencies"]}
    lines = (runtime / "requirements-cpu.txt").read_text().splitlines()
    asked = {line for line in lines if line and not line.startswith("#")}
    assert asked == {line for line in needed if not line.startswith("onnxruntime-gpu")}
