"""The tensors of an adapter, read and cast, by site."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .header import AdapterHeader, NamedTensor
from .tensor_files import array_in, require_finite, require_float


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
    """The tensors of one layer that was trained whole: of a linear one weight [out, in] and bias
    [out], of an embedding weight [vocabulary, dim]."""

    weight: np.ndarray
    bias: np.ndarray | None


ModuleWeights = LoraWeights | SavedWeights


class AdapterContent:
    """An adapter's weights file in memory, read once, and the digest of what was read."""

    def __init__(self, header: AdapterHeader) -> None:
        """Read the file that the header is of.

        Raises:
            AdapterError: a file has changed since the header was read.
            WeightsError: the file does not fit into memory.
        """
        self._data, self.digest = header.files.read_weights()

    def arrays(self, tensors: Iterable[NamedTensor]) -> dict[str, np.ndarray]:
        """Tensors by name. Raises WeightsError: one is no float, or holds NaN or Inf."""
        arrays = {}
        for name, info in tensors:
            require_float(name, info)
            arrays[name] = array_in(self._data, info)
            require_finite(arrays[name], f"{info.path}: tensor {name!r}")
        return arrays


def read_lora_weights(
    header: AdapterHeader,
    modules: Iterable[str] | None = None,
    content: AdapterContent | None = None,
) -> dict[str, LoraWeights]:
    """Read the LoRA of some modules (default: all). Raises WeightsError on NaN or Inf.

    Args:
        content: the adapter's, where it was read before.
    """
    chosen = {name: header.modules[name] for name in (modules or header.modules)}
    content = content or AdapterContent(header)
    arrays = content.arrays(tensor for module in chosen.values() for tensor in module.tensors())

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


def read_saved_weights(
    header: AdapterHeader, content: AdapterContent | None = None
) -> dict[str, SavedWeights]:
    """Read the layers that were trained whole. Raises WeightsError on NaN or Inf."""
    content = content or AdapterContent(header)
    arrays = content.arrays(tensor for saved in header.saved.values() for tensor in saved.tensors())
    return {
        name: SavedWeights(arrays[saved.weight[0]], arrays[saved.bias[0]] if saved.bias else None)
        for name, saved in header.saved.items()
    }


def read_site_weights(
    header: AdapterHeader, matched: Mapping[str, str], content: AdapterContent | None = None
) -> dict[str, ModuleWeights]:
    """Everything that an adapter brings, by site; `matched` is of `match_sites`."""
    content = content or AdapterContent(header)
    weights: dict[str, ModuleWeights] = {
        **read_lora_weights(header, content=content),
        **read_saved_weights(header, content),
    }
    return {site: weights[module] for site, module in matched.items()}
