"""scripts/report_coverage.py: what is printed, what is left out, and when it fails."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = """
def used():
    return 1

def on_gpu():
    a = 1
    return a

def forgotten():
    a = 1
    b = 2
    return a

used()
"""


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "coverage_script", ROOT / "scripts/report_coverage.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tree(root: Path, code: str, on_gpu: dict[str, dict[str, str]]) -> None:
    """Packages of one file each, of which the first has run, and the list."""
    others = ("runtime/loraexport_runtime/b.py", "runtime/serve/loraexport_serve/c.py")
    for file in ("loraexport/a.py", *others):
        (root / file).parent.mkdir(parents=True)
    file = root / "loraexport/a.py"
    file.write_text(code)
    for other in others:
        (root / other).write_text("x = 1\n")
    (root / "tests/gpu").mkdir(parents=True)
    (root / "tests/gpu/covered.json").write_text(json.dumps(on_gpu))
    measured = coverage.CoverageData(basename=str(root / ".coverage"))
    lines = {str(root / other): [1] for other in others}
    measured.add_lines({str(file): _lines_run(code), **lines})
    measured.write()


def _lines_run(code: str) -> list[int]:
    return [
        number
        for number, line in enumerate(code.splitlines(), 1)
        if line.startswith(("def", "used")) or line == "    return 1"
    ]


def test_lines_that_no_test_ran_are_named(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path, CODE, {"loraexport/a.py": {"on_gpu": "test_gpu.py::test_it"}})
    assert script.main(tmp_path) == 1
    assert capsys.readouterr().out.split("\n") == [
        "loraexport/a.py: 10-12",
        "loraexport: 57.1 % of 7 lines (at least 95 %)",
        "",
        "loraexport_runtime: 100.0 % of 1 lines (at least 95 %)",
        "",
        "loraexport_serve: 100.0 % of 1 lines (at least 95 %)",
        "",
        "",
    ]


def test_enough(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = CODE.replace("def forgotten():\n    a = 1\n    b = 2\n    return a\n", "")
    write_tree(tmp_path, whole, {"loraexport/a.py": {"on_gpu": "test_gpu.py::test_it"}})
    assert script.main(tmp_path) == 0
    assert "loraexport: 100.0 % of 3 lines" in capsys.readouterr().out
