"""Files that are no spec, or are made to harm who reads them."""

import itertools
from pathlib import Path

import pytest
from support.specs import problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: the file is empty ('loraexport schema' lists the keys)"),
        ("# only a comment\n", "1: the file is empty"),
        ("version: 1\nname: [\n", "3: not YAML: "),
        ("version: 1\n\tname: x\n", "2: not YAML: "),
        ("a: 'open\n", "2: not YAML: "),
        ("version: 1\n---\nversion: 1\n", "2: not YAML: but found another document"),
        ("just words\n", "1: expected mapping, got 'just words' (write it as key: value)"),
        ("- 1\n", "1: expected mapping, got [1]"),
        ("? [a]\n: b\n", "1: found unhashable key"),
        ("a: \x01\n", "1: not YAML: unacceptable character"),
        ("version: 1\nname: !!python/object:os.system x\n", "2: tag "),
        ("version: 1\nname: !!python/name:os.system\n", "2: tag "),
        (
            "version: 1\nname: !local x\n",
            "2: tag '!local' is not allowed in a spec; write the plain",
        ),
        ("version: 1\nname: !!set {x}\n", "2: tag "),
        ("version: 1\nname: !!timestamp 2020-01-01\n", "2: tag "),
        ("version: 1\nslots: !!int x\n", "1: not YAML: invalid literal for int()"),
        ("a: &a [*a]\n", "1: not YAML: nested too deeply"),
        ("[" * 3000, "1: not YAML: nested too deeply"),
    ],
)
def test_file_that_is_no_spec(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(expected)


def test_aliases_that_multiply(tmp_path: Path) -> None:
    """Nine lines of ten aliases each would be a billion values."""
    names = "abcdefghij"
    rows = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in itertools.pairwise(names):
        rows.append(f"{name}: &{name} [{', '.join(['*' + before] * 10)}]")
    (problem,) = problems(tmp_path, "\n".join(rows))
    assert problem.endswith("more than 100,000 values, aliases written out")
