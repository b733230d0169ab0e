"""Safetensors files -> shapes (header only) and numpy arrays. Nothing here unpickles."""

import hashlib
import os
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

import ml_dtypes
import numpy as np

from ..contract.foreign import open_regular, reason
from ..errors import WeightsError
from .tensor_header import HeaderError, parse_header
from .tensor_header import TensorInfo as TensorInfo

FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_LFS_POINTER = b"version https://git-lfs"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> shape and dtype of every tensor in a safetensors file, without reading the data.

    Raises:
        WeightsError: the file is missing, pickled, or its header is damaged.
    """
    if path.suffix in PICKLED_SUFFIXES:
        raise WeightsError(
            f"{path}: {path.suffix} files are unpickled on load and can run code; only safetensors"
            " are read. Convert it: load it with torch.load(..., weights_only=True), then"
            " safetensors.torch.save_file"
        )
    try:
        with open_regular(path) as file:
            return read_header_of(file, path)
    except OSError as error:
        raise WeightsError(f"{path}: {reason(error)}") from error


def read_header_of(file: BufferedReader, path: Path) -> dict[str, TensorInfo]:
    """The same of a file that is open, and stands at its start."""
    try:
        return parse_header(file, os.fstat(file.fileno()).st_size, path)
    except HeaderError as error:
        file.seek(0)
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise WeightsError(
                f"{path}: a Git LFS pointer, not the weights themselves; fetch them with"
                " 'git lfs pull'"
            ) from error
        raise WeightsError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def read_tensors(infos: Iterable[tuple[str, TensorInfo]]) -> dict[str, np.ndarray]:
    """Read the named tensors in their stored dtype (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        WeightsError: a tensor is not of a float type, or holds NaN or Inf; or the file is not
            there any more, or may not be read.
    """
    by_path: dict[Path, list[tuple[str, TensorInfo]]] = {}
    for name, info in infos:
        require_float(name, info)
        by_path.setdefault(info.path, []).append((name, info))
    arrays: dict[str, np.ndarray] = {}
    for path, tensors in by_path.items():
        try:
            with open_regular(path) as file:
                for name, info in tensors:
                    data = read_bytes(file, info)
                    arrays[name] = data.view(_NUMPY[info.dtype]).reshape(info.shape)
        except OSError as error:
            raise WeightsError(f"{path}: {reason(error)}") from error
        for name, _ in tensors:
            require_finite(arrays[name], f"{path}: tensor {name!r}")
    return arrays


def read_bytes(file: BufferedReader, info: TensorInfo) -> np.ndarray:
    """The bytes of a tensor, out of a file that is open.

    Raises:
        WeightsError: they do not fit into memory, or the file has become shorter.
    """
    try:
        data = np.empty(info.size, np.uint8)
    except MemoryError as error:
        raise WeightsError(f"{info.path}: a tensor does not fit into memory; free some") from error
    file.seek(info.start)
    if file.readinto(data.data) != info.size:
        raise WeightsError(f"{info.path}: it changed while it was read; try again")
    return data


def array_in(data: bytes, info: TensorInfo) -> np.ndarray:
    """A tensor of a file whose bytes are all here; it cannot be written to."""
    dtype = _NUMPY[info.dtype]
    count = info.size // dtype.itemsize
    return np.frombuffer(data, dtype, count, info.start).reshape(info.shape)


def require_float(name: str, info: TensorInfo) -> None:
    """Raise WeightsError unless a tensor is of a float type."""
    if info.dtype not in FLOAT_DTYPES:
        raise WeightsError(
            f"{info.path}: tensor {name!r} is {info.dtype}; only float weights"
            f" ({', '.join(FLOAT_DTYPES)}) are read, so dequantize a quantized checkpoint first"
        )


def require_finite(array: np.ndarray, where: str) -> None:
    """Raise WeightsError if the array holds NaN or Inf."""
    finite = np.isfinite(array)
    if not finite.all():
        raise WeightsError(
            f"{where}: {array.size - int(finite.sum())} of {array.size} values are NaN or Inf;"
            " the training has diverged or the file is damaged"
        )


def digest_array(array: np.ndarray) -> str:
    """sha256 over dtype, shape and bytes of an array, as hexadecimal text."""
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def digests_of(array: np.ndarray) -> set[str]:
    """Its digests in every dtype that holds its values exactly: a copy may have been widened."""
    digests = set()
    for name in FLOAT_DTYPES.values():
        with np.errstate(over="ignore"):
            cast = array.astype(name)
        if np.array_equal(cast.astype(np.float64), array.astype(np.float64)):
            digests.add(digest_array(cast))
    return digests
