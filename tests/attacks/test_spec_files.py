"""Files that are no spec, or are made to harm who reads them."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.specs import GOOD, problems, read

from loraexport.bench.results import read_results
from loraexport.bench.workloads.schema import read_workloads
from loraexport.errors import SpecError, UsageError
from loraexport.plan.costs import read_costs
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract import strict_yaml
from loraexport_runtime.contract.strict_yaml import MAX_PROBLEMS, Problem
from loraexport_runtime.errors import MAX_MESSAGE, LoraexportError, quoted


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
        ("x: " + "[" * 90 + "]" * 90, "1: not YAML: nested too deeply"),
        ('name: "a\\0b"\n', "1: 'a\\x00b' holds a NUL or half a character, which no name can"),
        ('"\\uD800": 1\n', "1: '\\ud800' holds a NUL or half a character"),
        ("slots: !!bool foo\n", "1: not YAML: 'foo' is neither true nor false"),
        ('export: {!!merge "<<": {dtype: bfloat16}}\n', "1: tag 'tag:yaml.org,2002:merge'"),
        (f"x: !{'y' * 10**5} 1\n", "1: tag '!yyyy"),
        ("#" * 2**20 + "\n", "1: more than 1 MiB, which no such file has"),
        ("x:\n" + "- \n" * 60_000, "50000: more than 50,000 values, aliases written out"),
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
    assert problem.endswith("more than 50,000 values, aliases written out")


def test_values_are_counted_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once all are there, which takes minutes: the line is that of the list."""
    monkeypatch.setattr(strict_yaml, "_MAX_VALUES", 20)
    (problem,) = problems(tmp_path, "\nx:\n" + "- \n" * 50)
    assert problem == "3: more than 50,000 values, aliases written out"
    (problem,) = problems(tmp_path, "\nx:\n" + "- \n" * 30)
    assert problem.startswith("21: ")


def test_long_text_that_aliases_multiply(tmp_path: Path) -> None:
    """100 KB here are 2 GB written out, which json and pydantic would do."""
    text = f"a: &a '{'x' * 100_000}'\nb: [{', '.join(['*a'] * 20_000)}]\n"
    (problem,) = problems(tmp_path, text)
    assert problem == "1: more than 4 MiB of text, aliases written out"


def test_a_fifo_and_a_device_are_no_specs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "spec.yaml")
    for path in (tmp_path / "spec.yaml", Path("/dev/zero")):
        with pytest.raises(SpecError, match=r":1: not a regular file \(give a YAML file"):
            read_spec(path)
    with pytest.raises(SpecError, match=":1: a NUL in its path, which no file has"):
        read_spec(Path("a\0b"))


@pytest.mark.parametrize("read_file", [read_costs, read_results, read_workloads])
def test_neither_are_they_other_files_that_a_command_takes(
    tmp_path: Path, read_file: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    for name in ("fifo", "bytes"):
        with pytest.raises(UsageError if read_file is not read_workloads else SpecError):
            read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slots: 65537", "slots: should be less than or equal to 65536, got 65537"),
        (f"max_rank: {'9' * 4000}", "max_rank: should be less than or equal to 65536, got 999"),
        ("parity: {seed: 9223372036854775808}", "parity.seed: should be less than 92233"),
        ("parity: {tokens: 4097}", "parity.tokens: should be less than or equal to 4096"),
        ("export: {tune: {tokens: 2147483648}}", "export.tune.tokens: should be less than or eq"),
        ("  - {name: b, path: " + "q" * 4097 + "}", "adapters[1].path: 4,097 characters, got 'qqq"),
        (
            "export: {tune: {costs: {device: a, launch: 1e999, gbyte: 1.0, gflop: 1.0}}}",
            "export.tune.costs.launch: should be a finite number, got inf",
        ),
    ],
)
def test_more_than_a_spec_may_ask_for(tmp_path: Path, line: str, expected: str) -> None:
    (problem,) = problems(tmp_path, f"{GOOD}{line}\n")
    assert problem.startswith(f"12: {expected}")


def test_a_layer_larger_than_any(tmp_path: Path) -> None:
    text = GOOD.replace("      site:", "      in_features: 16777217\n      site:")
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("9: base.layers[0].in_features: should be less than or equal to 1677")


def test_thousands_of_problems_are_kept_and_some_are_shown(tmp_path: Path) -> None:
    text = GOOD + "".join("  - {nmae: a}\n" for _ in range(2_000))
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        read(tmp_path, text)
    assert time.process_time() - start < 5  # each hint alone would take a millisecond
    assert len(caught.value.problems) == 6_000
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == f"… and {6_000 - MAX_PROBLEMS:,} more"


def test_long_values_are_cut(tmp_path: Path) -> None:
    key = "k" * 10_000
    (problem,) = problems(tmp_path, f"{GOOD}? {key}\n: 1\n")
    assert problem.startswith("12: kkkk")
    assert problem.endswith("kkkk: unknown key (remove it; 'loraexport schema' lists the keys)")
    assert len(problem) < 300
    (problem,) = problems(tmp_path, f'{GOOD}"a\\e[31mb": 1\n')
    assert problem.startswith("12: a\\x1b[31mb: unknown key")  # no code for a terminal
    assert len(str(Problem(1, "x", "m" * 10**5, "h" * 10**5))) == MAX_MESSAGE
    assert len(quoted("v" * 10**5)) == 200
    message = str(LoraexportError(f"{'m' * 10**5}; do this"))
    assert len(message) == MAX_MESSAGE
    assert message.startswith("mmm")
    assert message.endswith("m; do this")
