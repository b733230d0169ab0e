"""A base of kind layers: what is in place of each of its files is refused, and not waited for."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
from support.builds import write_small

from loraexport import make_plan
from loraexport.errors import exit_code
from loraexport_runtime.errors import LoraexportError

INDEX, SHARD = "model.safetensors.index.json", "shard.safetensors"


def make_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened, chdir(file.parent):
        opened.bind(file.name)  # its path may be too long for a socket's


MAKERS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda file: None,
    "empty": Path.touch,
    "folder": Path.mkdir,
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "terminal": lambda file: file.symlink_to("/dev/stdin"),
    "circle": lambda file: file.symlink_to(file.name),
    "link to nothing": lambda file: file.symlink_to("gone"),
    "memory": lambda file: file.symlink_to("/proc/self/mem"),
}


@pytest.fixture(params=[False, True], ids=["single", "sharded"])
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A spec of a base with one file of weights, or with an index and a shard."""
    write_small(tmp_path)
    if request.param:
        (tmp_path / "base/model.safetensors").rename(tmp_path / "base" / SHARD)
        write_index(tmp_path, SHARD)
    return tmp_path


def remove(file: Path) -> None:
    """Whatever it is, and never what a link leads to."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


def write_index(project: Path, shard: object) -> None:
    names = {"weight_map": {"blocks.0.up.weight": shard}}
    (project / "base" / INDEX).write_text(json.dumps(names))


def test_whole_it_is_planned(project: Path) -> None:
    make_plan(project / "spec.yaml")


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_no_file(project: Path, kind: str) -> None:
    for file in sorted((project / "base").iterdir()):
        if kind == "nothing" and file.name == INDEX:
            continue  # a folder of shards without an index is whole
        content = file.read_bytes()
        file.unlink()
        MAKERS[kind](file)
        with pytest.raises(LoraexportError, match=str(project / "base")) as caught:
            make_plan(project / "spec.yaml")
        assert exit_code(caught.value) == 4
        remove(file)
        file.write_bytes(content)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_base_that_is_no_folder(tmp_path: Path, kind: str) -> None:
    write_small(tmp_path)
    shutil.rmtree(tmp_path / "base")
    MAKERS[kind](tmp_path / "base")
    with pytest.raises(LoraexportError, match=str(tmp_path / "base")) as caught:
        make_plan(tmp_path / "spec.yaml")
    assert exit_code(caught.value) == 4


@pytest.mark.parametrize(
    "shard",
    ["a\0b", "x" * 5_000, "../base/shard.safetensors", "/etc/passwd", "..", "", "a/../b", 3],
)
def test_shards_that_no_index_may_name(tmp_path: Path, shard: object) -> None:
    write_small(tmp_path)
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base" / SHARD)
    write_index(tmp_path, shard)
    with pytest.raises(LoraexportError, match=str(tmp_path / "base")) as caught:
        make_plan(tmp_path / "spec.yaml")
    assert exit_code(caught.value) == 4
