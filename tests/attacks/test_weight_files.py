"""Weight files that are damaged, hostile or not weights at all; nothing is unpickled."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from loraexport_runtime.adapters.tensor_files import read_header, read_tensors
from loraexport_runtime.errors import WeightsError

TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
GOOD = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})


def raw(header: object, data: bytes = bytes(24)) -> bytes:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_length(length: int) -> bytes:
    """A good file whose first eight bytes lie about the header's length."""
    return struct.pack("<Q", length) + GOOD[8:]


GOOD_LENGTH = struct.unpack("<Q", GOOD[:8])[0]
DAMAGED = {
    "empty": b"",
    "seven_bytes": GOOD[:7],
    "ends_in_the_header": GOOD[:20],
    "ends_in_the_data": GOOD[:-4],
    "goes_on_after_the_data": GOOD + b"more",
    "length_too_short": with_length(GOOD_LENGTH - 8),
    "length_too_long": with_length(GOOD_LENGTH + 8),
    "length_beyond_the_file": with_length(10_000),
    "length_above_the_limit": with_length(101 * 2**20),
    "length_overflows": with_length(2**64 - 1),
    "header_is_no_json": raw(b"hello"),
    "header_is_a_list": raw([TENSOR]),
    "offsets_beyond_the_file": raw({"a": TENSOR | {"data_offsets": [0, 4000]}}),
    "offsets_backwards": raw({"a": TENSOR | {"data_offsets": [24, 0]}}),
    "shape_and_size_differ": raw({"a": TENSOR | {"shape": [2, 4]}}),
    "negative_size": raw({"a": TENSOR | {"shape": [-2, -3]}}),
    "size_overflows": raw({"a": TENSOR | {"shape": [2**62, 2**62]}}),
    "tensors_overlap": raw({"a": TENSOR, "b": TENSOR}),
    "hole_between_tensors": raw({"a": TENSOR | {"data_offsets": [8, 32]}}, bytes(32)),
    "unknown_dtype": raw({"a": TENSOR | {"dtype": "Q4"}}),
    "garbage": np.random.default_rng(0).bytes(500),
    "a_zip_archive": b"PK\x03\x04" + bytes(200),
    "a_pickle": b"\x80\x04\x95" + bytes(200),
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[name])
    expected = r"model\.safetensors: not a whole safetensors file \(.+\); copy or download it again"
    with pytest.raises(WeightsError, match=expected):
        read_header(path)


def test_good_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    info = read_header(path)["a"]
    assert (info.path, info.shape, info.dtype) == (path, (2, 3), "F32")
    np.testing.assert_array_equal(read_tensors([("a", info)])["a"].ravel(), np.arange(6))


def test_header_is_read_without_the_data(tmp_path: Path) -> None:
    """A sparse file of 64 GiB: what reads the data cannot pass."""
    path = tmp_path / "model.safetensors"
    size = 2**36
    path.write_bytes(raw({"a": TENSOR | {"shape": [2**17, 2**17], "data_offsets": [0, size]}}, b""))
    try:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + size)
    except OSError:
        pytest.skip("this file system has no sparse files of 64 GiB")
    assert read_header(path)["a"].shape == (2**17, 2**17)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"])
def test_pickled_files_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.raises(WeightsError, match=rf"{suffix} files are unpickled.*safetensors\.torch"):
        read_header(path)  # it does not even exist


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.safetensors: no such file"):
        read_header(tmp_path / "model.safetensors")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a folder, where a file has to be"):
        read_header(tmp_path)


def test_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(WeightsError, match=r"a Git LFS pointer.*'git lfs pull'"):
        read_header(path)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, dtype: type, value: float) -> None:
    array = np.ones((3, 2), dtype)
    array[1, 1] = value
    save_file({"good": np.ones(2, dtype), "bad": array}, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors")
    assert read_tensors([("good", infos["good"])])["good"].dtype == np.dtype(dtype)
    with pytest.raises(WeightsError, match=r"x\.safetensors: tensor 'bad': 1 of 6 values are NaN"):
        read_tensors(infos.items())


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int8, "I8"), (np.uint8, "U8"), (np.int64, "I64"), (np.bool_, "BOOL")]
)
def test_tensors_that_are_no_floats(tmp_path: Path, dtype: type, name: str) -> None:
    save_file({"ids": np.ones(4, dtype)}, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors")
    assert infos["ids"].dtype == name
    with pytest.raises(WeightsError, match=rf"tensor 'ids' is {name}; only float.*dequantize"):
        read_tensors(infos.items())
