"""DoRA: the factor of every output that makes a site's rows as long as its magnitudes say."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..contract.foreign import reason
from ..contract.listed import ListedFiles
from ..contract.manifest import Layer
from ..errors import ArtifactError, WeightsError
from .listed_tensors import read_listed_tensors
from .tensor_files import FLOAT_DTYPES, TensorInfo, digests_of, read_header, read_tensors
from .tensors import LoraWeights, ModuleWeights

SCALES_FILE = "output_scales.safetensors"
"""Of an adapter that an artifact carries: site -> g float32 [out], with the scale of the spec."""


def read_scales(files: ListedFiles, folder: str) -> dict[str, np.ndarray]:
    """g by site of an adapter that an artifact carries; none if it uses no DoRA.

    Args:
        folder: the adapter's, in the manifest.

    Raises:
        ArtifactError: the file is gone, or not what was listed.
    """
    path = f"{folder}/{SCALES_FILE}"
    return read_listed_tensors(files, path) if path in files else {}


def require_scales(
    scales: Mapping[str, np.ndarray], dora: Mapping[str, LoraWeights], where: Path
) -> None:
    """Raise ArtifactError unless there is one finite g [out] for each site with DoRA."""
    fits = scales.keys() == dora.keys() and all(
        scales[site].shape == (lora.b.shape[0],) and np.isfinite(scales[site]).all()
        for site, lora in dora.items()
    )
    if not fits:
        raise ArtifactError(
            f"{where / SCALES_FILE}: it does not have the sites of this adapter; build the artifact"
            " again"
        )


def output_scale(weight: np.ndarray, lora: LoraWeights, scale: float) -> np.ndarray:
    """g = m / ||W + scale * scaling B A||, the norms over the inputs; float32 [out].

    y = g (W x + scale * scaling B A x) + b then is DoRA (Liu et al., 2024) as peft computes it.

    Args:
        weight: W [out, in]; for an embedding its transpose, [dim, vocabulary].
        lora: with its magnitude m [out].
        scale: multiplies the adapter's scaling.

    Raises:
        WeightsError: a row of W + scale * scaling B A is zero.
    """
    assert lora.magnitude is not None, "the adapter uses DoRA at this site"
    a, b = lora.a.astype(np.float64), lora.b.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        merged = weight.astype(np.float64) + scale * lora.scaling * (b @ a)
        norms = np.linalg.norm(merged, axis=1)
    if not np.isfinite(norms).all():
        raise WeightsError(
            "DoRA: W + scaling B A is not finite, so its magnitude has no direction; lower the"
            " scale, or the adapter has diverged"
        )
    if not norms.all():
        raise WeightsError(
            f"DoRA: row {int(np.argmin(norms))} of W + scaling B A is zero, so its magnitude has no"
            " direction; the adapter was trained on another base, or has diverged"
        )
    with np.errstate(over="ignore"):  # where g is used, it has to be finite in the graph's dtype
        return (lora.magnitude.astype(np.float64) / norms).astype(np.float32)


def dora_sites(weights: Mapping[str, ModuleWeights]) -> dict[str, LoraWeights]:
    """The sites where an adapter uses DoRA."""
    return {
        site: lora
        for site, lora in weights.items()
        if isinstance(lora, LoraWeights) and lora.magnitude is not None
    }


def output_scales(
    dora: Mapping[str, LoraWeights],
    weight_of: Callable[[str], np.ndarray],
    layers: Iterable[Layer],
    scale: float,
) -> dict[str, np.ndarray]:
    """g by site; `weight_of` gives the W of each, [out, in] or an embedding's [vocabulary, dim]."""
    embeddings = {
        part.site for layer in layers if layer.kind == "embedding" for part in layer.slices
    }
    return {
        site: output_scale(
            weight_of(site).T if site in embeddings else weight_of(site), lora, scale
        )
        for site, lora in dora.items()
    }


def find_base_weights(folder: Path, digests: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The base's W for some sites, found in its safetensors files by digest.

    Args:
        folder: the base's directory.
        digests: site -> sha256 of W, as the manifest has it.

    Returns:
        W as the digest was taken of it: [out, in], or [vocabulary, dim].

    Raises:
        WeightsError: a site's weight is not there.
    """
    try:
        os.scandir(folder).close()
    except PermissionError as error:  # glob takes such a folder for an empty one
        raise WeightsError(f"{folder}: {reason(error)}") from error
    except OSError:
        pass  # no folder: none of its tensors is the weight
    files = sorted(folder.glob("*.safetensors"))
    tensors = [pair for file in files for pair in read_header(file).items()]
    weights = {}
    for site, digest in digests.items():
        # A site's own name first; another name where it is tied to another module.
        tensors.sort(key=lambda pair: not _is_named(pair[0], site))
        weight = next(_with_digest(tensors, digest), None)
        if weight is None:
            raise WeightsError(
                f"{folder}: none of its {len(tensors)} tensors is the weight of site {site!r} by"
                " digest, which DoRA needs; give the directory of the base that the artifact was"
                " built from"
            )
        weights[site] = weight
    return weights


def _is_named(tensor: str, site: str) -> bool:
    module = tensor.removesuffix(".weight")
    return module == site or site.endswith(f".{module}") or module.endswith(f".{site}")


def _with_digest(tensors: Iterable[tuple[str, TensorInfo]], digest: str) -> Iterator[np.ndarray]:
    for name, info in tensors:
        if len(info.shape) == 2 and info.dtype in FLOAT_DTYPES:  # not ids of positions
            array = read_tensors([(name, info)])[name]
            for matrix in (array, np.ascontiguousarray(array.T)):  # a Conv1D stores [in, out]
                if digest in digests_of(matrix):
                    yield matrix
