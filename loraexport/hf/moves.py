"""An adapter, and its base's checkpoint -> how far it moves every site. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loraexport_runtime.adapters.dora import output_scale
from loraexport_runtime.adapters.files import CONFIG_FILE
from loraexport_runtime.adapters.header import AdapterHeader, AdapterModule
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.adapters.tensor_files import FLOAT_DTYPES, TensorInfo, read_tensors
from loraexport_runtime.adapters.tensors import LoraWeights, read_lora_weights
from loraexport_runtime.errors import AdapterWeightsError

from .checkpoint import read_checkpoint
from .names.naming import read_naming
from .names.stored_names import loaded_names

_WEIGHT = ".weight"
_BLOCK_VALUES = 2**22


@dataclass(frozen=True)
class Delta:
    """What one module of an adapter adds to the weight of its site, before DoRA scales it."""

    name: str
    """The module as PEFT saved it."""
    module: AdapterModule
    norm: float
    """||scaling B A||_F"""
    adds_nothing: bool
    """All of B is zero."""


@dataclass(frozen=True)
class Move:
    """A delta beside the weight that it is added to."""

    site: str
    delta: Delta
    base_norm: float
    """||W||_F"""
    norm: float
    """||W' - W||_F: of the delta, but with DoRA W' = g (W + scaling B A) by rows."""

    @property
    def percent(self) -> float | None:
        """100 ||W' - W||_F / ||W||_F; None where W is zero."""
        return 100 * self.norm / self.base_norm if self.base_norm else None


def delta_norm(a: np.ndarray, b: np.ndarray, scaling: float) -> float:
    """||s B A||_F = |s| sqrt(trace((B^T B) (A A^T))), without forming B A.

    `a` [rank, in] and `b` [out, rank] of any float dtype; the products are [rank, rank] float64.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((b.T @ b) * (a @ a.T)))  # both are symmetric
    return abs(scaling) * math.sqrt(max(square, 0.0))


def frobenius_norm(weight: np.ndarray) -> float:
    """sqrt(sum w^2) in float64 of a matrix in any float dtype, a block of rows at a time."""
    rows = max(1, _BLOCK_VALUES // max(1, weight.shape[1]))
    total = 0.0
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows].astype(np.float64)
        total += float(np.vdot(block, block))
    return math.sqrt(total)


def measure_deltas(header: AdapterHeader) -> tuple[Delta, ...]:
    """Read an adapter's tensors and measure every module, in the header's order.

    Raises:
        WeightsError: a tensor holds NaN or Inf.
    """
    weights = read_lora_weights(header)
    return tuple(
        Delta(
            name,
            module,
            delta_norm(weights[name].a, weights[name].b, module.scaling),
            not weights[name].b.astype(bool).any(),
        )
        for name, module in header.modules.items()
    )


def measure_moves(header: AdapterHeader, base: Path) -> tuple[Move, ...]:
    """Measure every module beside its site in a base's checkpoint, one weight in memory at a time.

    A site is the name of a 2-D tensor without its `.weight`, as the model has it once it is loaded.

    Raises:
        BaseModelError: the directory holds no checkpoint.
        AdapterWeightsError: a module has no site here, or its shape is another.
        WeightsError: a tensor of either is not of a float type, or holds NaN or Inf.
    """
    stored = {
        name: info
        for name, info in read_checkpoint(base).items()
        if name.endswith(_WEIGHT) and len(info.shape) == 2
    }
    tensors = {
        loaded.removesuffix(_WEIGHT): (name, stored[name])
        for name, loaded in loaded_names(base, stored).items()
    }
    # A base may lack heads.
    modules = match_sites(replace(header, saved={}), tensors, read_naming(base, tensors))
    _check_shapes(header, modules, tensors)
    deltas = {delta.name: delta for delta in measure_deltas(header)}
    lora = read_lora_weights(header)
    moves = []
    for site, name in modules.items():
        weight = read_tensors([tensors[site]])[tensors[site][0]]
        norm = deltas[name].norm
        if lora[name].magnitude is not None:
            matrix = weight.T if _is_turned(weight, header, header.modules[name]) else weight
            norm = _dora_norm(matrix.astype(np.float64), lora[name])
        moves.append(Move(site, deltas[name], frobenius_norm(weight), norm))
    return tuple(moves)


def _is_turned(weight: np.ndarray, header: AdapterHeader, module: AdapterModule) -> bool:
    """Whether a weight is stored [in, out]."""
    if weight.shape[0] == weight.shape[1] and not module.is_embedding:
        return header.fan_in_fan_out
    return weight.shape != (module.out_features, module.in_features)


def _dora_norm(weight: np.ndarray, lora: LoraWeights) -> float:
    """||W' - W||_F with W' = g (W + scaling B A), g of each output; W [out, in] float64."""
    delta = lora.scaling * (lora.b.astype(np.float64) @ lora.a.astype(np.float64))
    g = output_scale(weight, lora, 1.0).astype(np.float64)
    return float(np.linalg.norm(g[:, None] * (weight + delta) - weight))


def _check_shapes(
    header: AdapterHeader, modules: Mapping[str, str], tensors: Mapping[str, tuple[str, TensorInfo]]
) -> None:
    """A linear weight is [out, in], with fan_in_fan_out also [in, out]; an embedding [in, out]."""
    fan_in_fan_out = header.fan_in_fan_out
    for site, name in modules.items():
        module, info = header.modules[name], tensors[site][1]
        if info.dtype not in FLOAT_DTYPES:
            continue  # quantized weights are packed into other shapes: reading them says so
        sizes = (module.in_features, module.out_features)
        allowed = [info.shape if module.is_embedding else info.shape[::-1]]
        if fan_in_fan_out:
            allowed.append(info.shape)
        if sizes in allowed:
            continue
        hint = "the adapter belongs to another base"
        if sizes == info.shape:
            hint += (
                ", or this one stores [in, out] as Conv1D does: then set fan_in_fan_out to true in"
                f" {CONFIG_FILE}"
            )
        site_sizes = allowed[-1]
        raise AdapterWeightsError(
            f"{header.path}: module {name!r} maps {sizes[0]} to {sizes[1]} features, but site"
            f" {site!r} maps {site_sizes[0]} to {site_sizes[1]}; {hint}"
        )
