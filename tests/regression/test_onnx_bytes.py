"""The graphs of the shipped specs, byte for byte as they were when their digests were written down.

A change of these bytes is a change for everybody who holds artifacts by digest: make it on purpose,
say so in CHANGELOG.md, and write the digests of the new graphs into onnx_bytes.json.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from support.home import Home

from loraexport_runtime.contract.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
KEPT: dict[str, Any] = json.loads((ROOT / "tests/regression/onnx_bytes.json").read_text())
VERSIONS: dict[str, str] = KEPT["versions"]
FILES: dict[str, dict[str, str]] = KEPT["files"]


@pytest.fixture(scope="module")
def exporters() -> None:
    """The digests hold for the exporters of constraints.txt, which CI installs."""
    installed = {name: version(name).split("+")[0] for name in VERSIONS}
    if installed != VERSIONS:
        pytest.skip(f"the digests are of {VERSIONS}, here are {installed}")


SLOW = {"minilm-packed", "sharded"}


@pytest.mark.usefixtures("exporters")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FILES],
)
def test_same_onnx_bytes(name: str, home: Home) -> None:
    artifact = home.build(ROOT / f"specs/{name}.yaml")
    digests = {
        file: entry.sha256
        for file, entry in Manifest.read(artifact).files.items()
        if file.startswith("graphs/") and not file.endswith(".ts")  # these hold module names
    }
    assert digests == FILES[name]


def test_the_digests_are_of_the_versions_that_ci_installs() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    assert {name: pinned[name] for name in VERSIONS} == VERSIONS
