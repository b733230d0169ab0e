"""The tensors of an adapter, read and cast, by site."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .header import AdapterHeader, NamedTensor
from .tensor_files import read_tensors


@dataclass(frozen=True)
class LoraWeights:
    """The tensors of one module: A [rank, in], B [out, rank], as stored; see AdapterModule."""

    a: np.ndarray
    b: np.ndarray
    scaling: float
    magnitude: np.ndarray | None = None
    lora_bias: np.ndarray | None = None
    base_bias: np.ndarray | None = None


@dataclass(frozen=True)
class SavedWeights:
    """The tensors of one linear layer that was trained whole: weight [out, in], bias [out]."""

    weight: np.ndarray
    bias: np.ndarray | None


ModuleWeights = LoraWeights | SavedWeights


def read_lora_weights(
    header: AdapterHeader, modules: Iterable[str] | None = None
) -> dict[str, LoraWeights]:
    """Read the LoRA of some modules (default: all). Raises WeightsError on NaN or Inf."""
    chosen = {name: header.modules[name] for name in (modules or header.modules)}
    arrays = read_tensors(tensor for module in chosen.values() for tensor in module.tensors())

    def values(tensor: NamedTensor | None) -> np.ndarray | None:
        return None if tensor is None else arrays[tensor[0]]

    return {
        name: LoraWeights(
            arrays[module.a[0]],
            arrays[module.b[0]],
            module.scaling,
            values(module.magnitude),
            values(module.lora_bias),
            values(module.base_bias),
        )
        for name, module in chosen.items()
    }


def read_saved_weights(header: AdapterHeader) -> dict[str, SavedWeights]:
    """Read the layers that were trained whole. Raises WeightsError on NaN or Inf."""
    arrays = read_tensors(tensor for one in header.saved.values() for tensor in one.tensors())
    return {
        name: SavedWeights(arrays[one.weight[0]], arrays[one.bias[0]] if one.bias else None)
        for name, one in header.saved.items()
    }


def read_site_weights(
    header: AdapterHeader, matched: Mapping[str, str]
) -> dict[str, ModuleWeights]:
    """Everything that an adapter brings, by site; `matched` is of `match_sites`."""
    found: dict[str, ModuleWeights] = {**read_lora_weights(header), **read_saved_weights(header)}
    return {site: found[module] for site, module in matched.items()}
