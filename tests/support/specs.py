"""A small spec as text, and what is wrong with a changed one; those of specs/."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraexport.errors import SpecError
from loraexport.spec.reader import read_spec
from loraexport.spec.schema import Spec

from .documents import ROOT
from .home import Home

GOOD = """\
version: 1
name: tiny
base:
  kind: layers
  path: base
  layers:
    - name: up
      type: linear
      site: blocks.0.up
adapters:
  - {name: sql, path: sql}
"""


def read(folder: Path, text: str) -> Spec:
    file = folder / "spec.yaml"
    file.write_text(text)
    return read_spec(file)


def problems(folder: Path, text: str) -> list[str]:
    """Each problem as `line: path: message (hint)`, and the promise that the text lists them."""
    with pytest.raises(SpecError) as caught:
        read(folder, text)
    lines = str(caught.value).splitlines()
    prefix = f"{folder / 'spec.yaml'}:"
    assert all(line.startswith(prefix) for line in lines)
    assert len(lines) == len(caught.value.problems)
    return [line.removeprefix(prefix) for line in lines]


def require_base(spec: Path) -> None:
    """Skip the test where a spec's base is none of the repository's, and was not made."""
    if spec.stem == "smollm2" and not (ROOT / "smollm2/config.json").is_file():
        pytest.skip("its base is made by specs/make/smollm2.py")


def beside_its_base(spec: Path, folder: Path, home: Home) -> Path:
    """A copy of one of specs/ in folder/specs, with links to what it names; a graph is made by the
    script that the spec's header names."""
    (folder / "specs").mkdir(parents=True)
    for name in ("adapters", "bases"):
        (folder / "specs" / name).symlink_to(ROOT / "specs" / name)
    (folder / "smollm2").symlink_to(ROOT / "smollm2")
    if spec.stem == "minilm-onnx":
        (folder / "minilm-onnx").symlink_to(home.once("minilm-onnx", _make_graph))
    return Path(shutil.copy(spec, folder / "specs"))


def _make_graph(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "specs/make/minilm_onnx.py"), "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
