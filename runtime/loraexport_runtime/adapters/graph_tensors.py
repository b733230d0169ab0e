"""Initializers of an artifact's graphs -> arrays, out of the files that were held to a digest."""

from contextlib import ExitStack
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Self

import numpy as np

from ..contract.listed import ListedFiles
from ..contract.onnx_file import OnnxFile, read_onnx
from ..errors import ArtifactError


class GraphTensors:
    """What lies in the files beside a graph, each opened and compared once; a context manager."""

    def __init__(self, files: ListedFiles) -> None:
        self._files = files
        self._graphs: dict[str, OnnxFile] = {}
        self._opened: dict[str, BufferedReader] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, graph: str, name: str, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """The first rows of an initializer.

        Args:
            graph: the file's path in the manifest.
            shape: of these rows.

        Raises:
            ArtifactError: it is not there, or a file is gone or not what was listed.
        """
        if graph not in self._graphs:
            with self._files.open(graph):  # held to its digest
                self._graphs[graph] = read_onnx(self._files.folder / graph, ArtifactError)
        where = self._graphs[graph].external.get(name)
        size = shape[0] * shape[1] * dtype.itemsize
        if where is None or where.length < size:
            raise self._refuse(graph, f"no file beside it holds {name!r}")
        path = str(PurePosixPath(graph).parent / where.location)
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(self._files.open(path))
        try:
            self._opened[path].seek(where.offset)
            data = self._opened[path].read(size)
        except (OSError, ValueError) as error:
            raise self._refuse(path, str(error)) from error
        if len(data) != size:
            raise self._refuse(path, f"{name!r} is not whole")
        return np.frombuffer(data, dtype).reshape(shape)

    def _refuse(self, path: str, problem: str) -> ArtifactError:
        return ArtifactError(
            f"{self._files.folder / path}: {problem}; copy the artifact again, or build it again"
        )
