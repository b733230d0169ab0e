"""What is in the four wheels, and that the distributions are of one version."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import loraexport
import loraexport_kernels
import loraexport_runtime
import loraexport_serve

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "loraexport": ROOT,
    "loraexport_runtime": ROOT / "runtime",
    "loraexport_serve": ROOT / "runtime/serve",
    "loraexport_kernels": ROOT / "runtime/kernels",
}
LIBRARY = "loraexport_kernels/libloraexport_kernels.so"
"""Compiled, so it is in no folder of sources."""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """The wheels, built of a copy: setuptools writes beside the sources."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("loraexport", "runtime"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder)]
    command += ["./runtime", "./runtime/serve", "./runtime/kernels", "."]
    done = subprocess.run(
        command,
        cwd=source,
        env={**os.environ, "LORAEXPORT_KERNELS_CPU": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))) for name in FOLDERS}


def project(name: str) -> dict[str, Any]:
    text = (FOLDERS[name] / "pyproject.toml").read_text(encoding="utf-8")
    read: dict[str, Any] = tomllib.loads(text)["project"]
    return read


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel(wheels: dict[str, zipfile.ZipFile], name: str) -> None:
    """Every module, the mark of types, the licence, the project's addresses, and nothing else."""
    wheel, package = wheels[name], FOLDERS[name] / name
    info = {entry for entry in wheel.namelist() if ".dist-info/" in entry}
    kept = {".py", ".typed", ".json", ".html"}
    files = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix in kept
    }
    compiled = {LIBRARY} if name == "loraexport_kernels" else set()
    assert set(wheel.namelist()) - info == files | compiled
    assert f"{name}/py.typed" in files
    (licence,) = (entry for entry in info if entry.endswith("/licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    said = metadata(wheel)
    assert said["License-Expression"] == "Apache-2.0"
    labels = {str(value).split(",")[0] for value in said.get_all("Project-URL", [])}
    assert labels == {"Homepage", "Documentation", "Issues", "Changelog"}


def test_one_version(wheels: dict[str, zipfile.ZipFile]) -> None:
    version = loraexport_runtime.__version__
    assert {loraexport.__version__, loraexport_serve.__version__} == {version}
    assert loraexport_kernels.__version__ == version
    assert {metadata(wheel)["Version"] for wheel in wheels.values()} == {version}
    for link in (
        "loraexport",
        "runtime/serve/loraexport_serve",
        "runtime/kernels/loraexport_kernels",
    ):
        assert (ROOT / link / "version.py").is_symlink(), "the number stands in the runtime alone"
    for name in FOLDERS:
        assert project(name)["dynamic"] == ["version"]


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("loraexport", "loraexport-runtime"),
        ("loraexport_serve", "loraexport-runtime[generation,grammar]"),
    ],
)
def test_each_takes_the_runtime_of_its_version(name: str, taken: str) -> None:
    pinned = [one for one in project(name)["dependencies"] if "runtime" in one]
    assert pinned == [f"{taken}=={loraexport.__version__}"]


def test_the_kernels_are_for_any_python_of_a_platform(wheels: dict[str, zipfile.ZipFile]) -> None:
    name = Path(str(wheels["loraexport_kernels"].filename)).name
    assert re.fullmatch(r"loraexport_kernels-[\d.]+-py3-none-linux_\w+\.whl", name), name


def test_a_release_is_of_a_commit(tmp_path: Path) -> None:
    """What is not committed would not be in it."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts/release", tmp_path / "scripts")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "scripts/release: commit these first, as the last commit is what it builds:\n?? scripts/\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "scripts"]


@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/reference/api.md", "runtime/README.md"]
)
def test_what_a_service_needs_is_told(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    needed = {re.split(r"[>=;]", one)[0] for one in project("loraexport_runtime")["dependencies"]}
    assert {name for name in needed - {"onnxruntime-gpu"} if name not in text} == set()
