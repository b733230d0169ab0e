"""What is in the two wheels, and that both distributions are of one version."""

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
import loraexport_runtime

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"loraexport": ROOT, "loraexport_runtime": ROOT / "runtime"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """Both wheels, built of a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("loraexport", "runtime"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), "./runtime", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
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
    kept = {".py", ".typed", ".json"}
    files = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix in kept
    }
    assert set(wheel.namelist()) - info == files
    assert f"{name}/py.typed" in files
    (licence,) = (entry for entry in info if entry.endswith("/licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    said = metadata(wheel)
    assert said["License-Expression"] == "Apache-2.0"
    labels = {str(value).split(",")[0] for value in said.get_all("Project-URL", [])}
    assert labels == {"Homepage", "Documentation", "Issues", "Changelog"}


def test_one_version(wheels: dict[str, zipfile.ZipFile]) -> None:
    version = loraexport_runtime.__version__
    assert loraexport.__version__ == version
    assert {metadata(wheel)["Version"] for wheel in wheels.values()} == {version}
    assert (ROOT / "loraexport/version.py").is_symlink(), "the number stands in the runtime alone"
    for name in FOLDERS:
        assert project(name)["dynamic"] == ["version"]


def test_the_exporter_takes_the_runtime_of_its_version() -> None:
    pinned = [one for one in project("loraexport")["dependencies"] if "runtime" in one]
    assert pinned == [f"loraexport-runtime=={loraexport.__version__}"]
