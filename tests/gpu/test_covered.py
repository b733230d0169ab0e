"""The list of what only a GPU reaches names functions and GPU tests that exist."""

import json
from pathlib import Path

import pytest
from support.functions import function_lines

ROOT = Path(__file__).resolve().parents[2]
COVERED: dict[str, dict[str, str]] = json.loads((ROOT / "tests/gpu/covered.json").read_text())


@pytest.mark.parametrize("file", COVERED)
def test_functions_and_their_tests_exist(file: str) -> None:
    tests = {f"test_gpu.py::{name}" for name in function_lines(ROOT / "tests/gpu/test_gpu.py")}
    assert set(COVERED[file]) <= set(function_lines(ROOT / file))
    assert set(COVERED[file].values()) <= tests
