"""A user's graph whose external data is not a regular file in its folder: exit code 4."""

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from loraexport.errors import BaseModelError
from loraexport.graphs.files import read_graph


def write_graph(folder: Path, location: str, place: str = "initializer") -> Path:
    """A graph with one tensor elsewhere: an initializer, or the value of a Constant."""
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, data_location=1, dims=[4])
    for key, value in {"location": location, "length": "16"}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    if place == "initializer":
        nodes, values = [helper.make_node("Identity", ["w"], ["y"])], [tensor]
    else:
        nodes, values = [helper.make_node("Constant", [], ["y"], value=tensor)], []
    model = helper.make_model(helper.make_graph(nodes, "g", [], [y], values))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


PLACES: dict[str, Callable[[Path], object]] = {
    "/etc/passwd": lambda folder: None,
    "../outside.bin": lambda folder: (folder / "../outside.bin").write_bytes(bytes(16)),
    "inner/../../outside.bin": lambda folder: (folder / "inner").mkdir(),
    "": lambda folder: None,
    "a\0b": lambda folder: None,
    "link": lambda folder: (folder / "link").symlink_to("/etc/passwd"),
    "zero": lambda folder: (folder / "zero").symlink_to("/dev/zero"),
    "circle": lambda folder: (folder / "circle").symlink_to("circle"),
    "pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "folder": lambda folder: (folder / "folder").mkdir(),
    "nowhere": lambda folder: None,
    "x" * 5000: lambda folder: None,
}


@pytest.mark.parametrize("place", ["initializer", "constant"])
@pytest.mark.parametrize("location", PLACES)
def test_is_refused_unread(tmp_path: Path, location: str, place: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    PLACES[location](folder)
    text = "is not in its folder|not a regular file|a folder, where|no such file|name too long"
    with pytest.raises(BaseModelError, match=f"(?i){text}"):
        read_graph(write_graph(folder, location, place))


def test_a_file_beside_it_and_links_inside_are_read(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(16))
    (tmp_path / "link.bin").symlink_to("data.bin")
    for location in ("data.bin", "link.bin"):
        assert read_graph(write_graph(tmp_path, location)).graph.outputs[0].name == "y"


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name/blobs").mkdir()
    (tmp_path / "models--org--name/blobs/abc").write_bytes(bytes(16))
    (snapshot / "data.bin").symlink_to("../../blobs/abc")
    assert read_graph(write_graph(snapshot, "data.bin")).graph.outputs[0].name == "y"


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x7f"])
def test_a_file_that_is_no_graph(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BaseModelError, match="not readable as ONNX"):
        read_graph(tmp_path / "model.onnx")
