"""parity/cases.safetensors -> the arrays of the cases that a build kept, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..adapters.listed_tensors import read_listed_tensors
from ..contract.files import resolve
from ..contract.listed import ListedFiles
from ..contract.manifest import Manifest
from ..errors import ArtifactError
from .rows import slot_names

CASES_FILE = "parity/cases.safetensors"
SOURCE = "the stored cases"


@dataclass(frozen=True)
class StoredArrays:
    """Arrays by name. One that is absent or of another shape is an ArtifactError."""

    file: Path
    arrays: Mapping[str, np.ndarray]

    def read(self, name: str, *shape: int | None) -> np.ndarray:
        """An array of a shape, in which None stands for any size."""
        if name not in self.arrays:
            raise self.refuse(f"{name!r} is missing")
        array = self.arrays[name]
        sizes = zip(array.shape, shape, strict=False)
        if len(array.shape) != len(shape) or any(
            expected not in (None, size) for size, expected in sizes
        ):
            raise self.refuse(f"{name!r} has shape {list(array.shape)}")
        return array

    def refuse(self, problem: str) -> ArtifactError:
        return ArtifactError(
            f"{self.file}: {problem}, so these are not the cases of this manifest; build the"
            " artifact again"
        )


def read_stored(folder: Path, manifest: Manifest) -> StoredArrays:
    """Read the stored cases of an artifact.

    Raises:
        ArtifactError: the manifest lists none, or the file is missing or damaged.
    """
    file = resolve(folder, CASES_FILE)
    if CASES_FILE not in manifest.files or not slot_names(manifest):
        raise ArtifactError(f"{file}: the artifact holds no stored cases; build it again")
    return StoredArrays(file, read_listed_tensors(ListedFiles(folder, manifest.files), CASES_FILE))
