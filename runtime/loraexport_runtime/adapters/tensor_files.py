"""Safetensors files -> shapes (header only) and numpy arrays. Nothing here unpickles."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors relies on
import numpy as np
from safetensors import SafetensorError, safe_open

from ..contract.foreign import reason, require_file
from ..errors import WeightsError

FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LFS_POINTER = b"version https://git-lfs"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says about one tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """A safetensors dtype name: `F32`, `F16`, `BF16`, `I64`, …"""


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
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        # Of every file that it cannot open, safetensors says that there is none.
        require_file(path, WeightsError)
        if _is_lfs_pointer(path):
            raise WeightsError(
                f"{path}: a Git LFS pointer, not the weights themselves; fetch them with"
                " 'git lfs pull'"
            ) from error
        raise WeightsError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def read_tensors(infos: Iterable[tuple[str, TensorInfo]]) -> dict[str, np.ndarray]:
    """Read the named tensors in their stored dtype (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        WeightsError: a tensor is not of a float type, or holds NaN or Inf; or the file is not
            there any more, or may not be read.
    """
    by_path: dict[Path, list[str]] = {}
    for name, info in infos:
        if info.dtype not in FLOAT_DTYPES:
            raise WeightsError(
                f"{info.path}: tensor {name!r} is {info.dtype}; only float weights"
                f" ({', '.join(FLOAT_DTYPES)}) are read, so dequantize a quantized checkpoint first"
            )
        by_path.setdefault(info.path, []).append(name)
    arrays: dict[str, np.ndarray] = {}
    for path, names in by_path.items():
        try:
            with safe_open(path, framework="numpy") as file:
                for name in names:
                    arrays[name] = file.get_tensor(name)
        except OSError as error:
            require_file(path, WeightsError)
            raise WeightsError(f"{path}: {reason(error)}; try again") from error
        for name in names:
            require_finite(arrays[name], f"{path}: tensor {name!r}")
    return arrays


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
