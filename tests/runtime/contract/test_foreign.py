"""The reader of others' files: what it takes, and how it says what it does not."""

import errno
import json
import os
from pathlib import Path

import pytest

from loraexport_runtime.contract import foreign
from loraexport_runtime.errors import ArtifactError, WeightsError


def test_what_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": {"b": [1, "é"]}}', encoding="utf-8")
    data = foreign.read_object(file, ArtifactError)
    assert data == {"a": {"b": [1, "é"]}} == foreign.read_json(file, ArtifactError)
    assert foreign.value_of(data, "a.b", list, file, ArtifactError) == [1, "é"]
    assert foreign.has_file(file)
    assert not foreign.has_file(tmp_path / "b.json")
    assert not foreign.has_file(file / "inside")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"{", "a.json: not JSON: Expecting property name"),
        (b" \n", "a.json: the file is empty; copy or download it again"),
        (b"\xff", "a.json: not UTF-8 text"),
        (b"[" * 10**6, "a.json: not JSON: nested too deeply"),
        (b"[1]", "a.json: expected an object, got a list"),
        (b'"' + b"x" * 99 + b'"', r"got 'x{39}…; copy"),
        (b"null", "expected an object, got None"),
    ],
)
def test_what_is_broken(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(WeightsError, match=expected):
        foreign.read_object(tmp_path / "a.json", WeightsError)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"b\.json: no such file; take another$"):
        foreign.read_json(tmp_path / "b.json", ArtifactError, "take another")
    with pytest.raises(ArtifactError, match="a folder, where a file has to be"):
        foreign.read_json(tmp_path, ArtifactError, "take another")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(foreign.os, "open", None)  # which lets a writer go on, or rewinds a tape
    with pytest.raises(ArtifactError, match="pipe: not a regular file"):
        foreign.read_json(tmp_path / "pipe", ArtifactError)


def test_a_regular_file_that_no_read_succeeds_on() -> None:
    with pytest.raises(ArtifactError, match="/proc/self/mem: Input/output error; copy or"):
        foreign.read_json(Path("/proc/self/mem"), ArtifactError)


def test_a_file_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MAX_BYTES", 2**20)
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(ArtifactError, match="more than 1 MiB, which no such file has"):
        foreign.read_json(tmp_path / "a.json", ArtifactError)


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("a.c", int, "key 'a.c' is missing"),
        ("a.b.c", int, "key 'a.b.c' is missing"),
        ("a.b", str, "a.b: expected a text, got True"),
        ("a.b", int, "a.b: expected an integer, got True"),
        ("a", list, "a: expected a list, got an object"),
    ],
)
def test_a_value_of_another_kind(path: str, kind: type, expected: str) -> None:
    data = json.loads('{"a": {"b": true}}')
    with pytest.raises(ArtifactError, match=f"^x.json: {expected}; copy or download it again"):
        foreign.value_of(data, path, kind, Path("x.json"), ArtifactError)
    assert foreign.value_of(data, "a.b", bool, Path("x.json"), ArtifactError) is True


def test_reasons() -> None:
    def of(code: int) -> str:
        return foreign.reason(OSError(code, os.strerror(code)))

    assert of(errno.ENOENT) == "no such file"
    assert of(errno.EACCES) == "permission denied; let this user read it"
    assert of(errno.EISDIR) == "a folder, where a file has to be"
    assert of(errno.EIO) == os.strerror(errno.EIO)


@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a": ', "}")])
def test_how_deep_a_value_may_nest(tmp_path: Path, opens: str, closes: str) -> None:
    """Far below what Python's own stack bears: to walk or to show a value takes more of it."""
    file = tmp_path / "a.json"
    for depth in (foreign.MAX_DEPTH, foreign.MAX_DEPTH + 1):
        file.write_text(opens * depth + "1" + closes * depth)
        if depth == foreign.MAX_DEPTH:
            foreign.read_json(file, ArtifactError)
            continue
        with pytest.raises(ArtifactError, match=r"a\.json: not JSON: nested too deeply"):
            foreign.read_json(file, ArtifactError)
