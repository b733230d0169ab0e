"""Every spec of specs/ whose graphs can call functions, with export.kernels: its build holds stock
operators and kernels to the same reference, row by row."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.home import Home
from support.specs import beside_its_base, require_base

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("installed")
OTHERS = {"bfloat16", "embedding"}
"""Deferred where there is no CUDA device; of embeddings alone, which call no function."""
DEFAULT = {"synthetic"}
SPECS = [
    pytest.param(spec, marks=[] if spec.stem in DEFAULT else [pytest.mark.slow], id=spec.stem)
    for spec in sorted((ROOT / "specs").glob("*.yaml"))
    if spec.stem not in OTHERS
]


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_parity(spec: Path, home: Home, tmp_path: Path) -> None:
    require_base(spec)
    changed = with_kernels(beside_its_base(spec, tmp_path, home))
    folder = home.build(changed, tmp_path / "artifacts")
    report = json.loads((folder / "parity/parity.json").read_text(encoding="utf-8"))
    assert report["status"] == "passed"
    held: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for row in report["rows"]:
        held[row["implementation"]].add((row["layer"], row["site"], row["adapter"]))
    assert held["onnx-cpu"]
    assert held["onnx-cpu-kernels"] == held["onnx-cpu"]
    assert held["onnx-engine-cpu-kernels"] == held["onnx-engine-cpu"]


def with_kernels(spec: Path) -> Path:
    """The same spec with functions; by a strategy that has them."""
    data = yaml.safe_load(spec.read_text(encoding="utf-8"))
    export = data.setdefault("export", {})
    export["kernels"] = True
    if export.get("strategy") in ("segmented", "chunked"):
        export["strategy"] = "masked"
    spec.write_text(yaml.safe_dump(data), encoding="utf-8")
    return spec
