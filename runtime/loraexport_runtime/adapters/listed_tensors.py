"""Safetensors files of an artifact -> arrays, out of the very files that were held to a digest."""

import os
from contextlib import ExitStack
from io import BufferedReader
from typing import Self

import numpy as np

from ..contract.listed import ListedFiles
from ..device.dtypes import NUMPY_DTYPES
from ..errors import ArtifactError, WeightsError
from .tensor_files import read_bytes
from .tensor_header import HeaderError, TensorInfo, parse_header

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


class ListedTensors:
    """The tensors of listed files, each file opened and compared once; a context manager."""

    def __init__(self, files: ListedFiles) -> None:
        self._files = files
        self._opened: dict[str, tuple[BufferedReader, dict[str, TensorInfo]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self, path: str) -> list[str]:
        """The tensors of a file. Raises ArtifactError, as `read`."""
        return list(self._open(path)[1])

    def read(self, path: str, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of a file, by the file's path in the manifest.

        Args:
            shape: what it has to be; default: any.

        Raises:
            ArtifactError: the file is gone, or not what was listed, or lacks this tensor.
        """
        file, header = self._open(path)
        try:
            info = header[name]
            dtype = NUMPY_DTYPES[_DTYPES[info.dtype]]
            array = read_bytes(file, info).view(dtype).reshape(info.shape)
        except (KeyError, OSError, WeightsError) as error:
            raise self._refuse(path, error) from error
        if shape is not None and array.shape != shape:
            raise self._refuse(path, f"{name!r} is not {list(shape)}")
        return array

    def _open(self, path: str) -> tuple[BufferedReader, dict[str, TensorInfo]]:
        if path not in self._opened:
            file = self._stack.enter_context(self._files.open(path))
            try:
                size = os.fstat(file.fileno()).st_size
                self._opened[path] = file, parse_header(file, size, self._files.folder / path)
            except (HeaderError, OSError) as error:
                raise self._refuse(path, error) from error
        return self._opened[path]

    def _refuse(self, path: str, problem: object) -> ArtifactError:
        return ArtifactError(
            f"{self._files.folder / path}: cannot be read as safetensors ({problem}); copy the"
            " artifact again, or build it again"
        )


def read_listed_tensors(files: ListedFiles, path: str) -> dict[str, np.ndarray]:
    """Every tensor of a listed file, by name; raises ArtifactError as `ListedTensors.read`."""
    with ListedTensors(files) as tensors:
        return {name: tensors.read(path, name) for name in tensors.names(path)}
