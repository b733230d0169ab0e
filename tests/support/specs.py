"""A small spec as text, and what is wrong with a changed one."""

from pathlib import Path

import pytest

from loraexport.errors import SpecError
from loraexport.spec.reader import read_spec
from loraexport.spec.schema import Spec

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
