"""Tensors of several files, and the digest of an array."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraexport_runtime.adapters.tensor_files import digest_array, read_header, read_tensors


def test_tensors_of_several_files(tmp_path: Path) -> None:
    for index in range(2):
        save_file({f"t{index}": np.full(2, index, np.float32)}, tmp_path / f"{index}.safetensors")
    infos = {k: v for i in range(2) for k, v in read_header(tmp_path / f"{i}.safetensors").items()}
    assert {k: v.tolist() for k, v in read_tensors(infos.items()).items()} == {
        "t0": [0.0, 0.0],
        "t1": [1.0, 1.0],
    }


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "value": lambda array: array + np.float32(1),
    "shape": lambda array: array.reshape(3, 2),
    "dtype": lambda array: array.view(np.int32),
    "order": lambda array: array[::-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_tells_arrays_apart(change: str) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest_array(CHANGES[change](array)) != digest_array(array)


def test_digest_does_not_depend_on_the_layout() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest_array(np.asfortranarray(array)) == digest_array(array)
