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


def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
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
        "onnxruntime and onnxruntime-gpu are both installed, into the same folder, .*: pip"
        r" uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu \(or"
    )
    with pytest.warns(RuntimeWarning, match=text):
        installed.check_installed()


@pytest.mark.parametrize("version", ["1.22.0", "1.24.4", "1.30.1", "0.9"])
def test_too_old(version: str) -> None:
    """Ahead of anything that it lacks: here it is an empty module."""
    done = run(
        "import sys, types, importlib.machinery as m; old = types.ModuleType('onnxruntime');"
        f" old.__version__ = {version!r}; old.__spec__ = m.ModuleSpec('onnxruntime', None);"
        f" sys.modules['onnxruntime'] = old; {IMPORT}"
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        f"ImportError: loraexport-runtime needs onnxruntime 1.31 or later, and this one is"
        f" {version}: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install"
        " onnxruntime-gpu (or onnxruntime, for the CPU alone)"
    )


@pytest.mark.parametrize("version", ["1.31.0", "1.32.0.dev20261101", "2.0.0+cu13", "of our own"])
def test_new_enough(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        installed.check_installed()


def test_one_of_two_was_uninstalled(tmp_path: Path) -> None:
    """What remains is a folder without its modules, which Python takes for a namespace."""
    (tmp_path / "onnxruntime/capi").mkdir(parents=True)
    done = run(
        "import sys; sys.path[:] = [sys.argv[1], *(p for p in sys.path if 'site-packages' not in"
        f" p)]; {IMPORT}",
        str(tmp_path),
    )
    assert done.returncode == 1
    assert "ImportError: the module onnxruntime is there, but not whole" in done.stderr
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install" in done.stderr


def test_the_least_version_is_what_pip_is_asked_for() -> None:
    text = (ROOT / "runtime/pyproject.toml").read_text()
    least = ".".join(map(str, installed.LEAST_VERSION))
    for name in installed.DISTRIBUTIONS:
        assert f'"{name}>={least};' in text


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
