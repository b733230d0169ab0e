"""What a strategy adds to a linear layer on a GPU: the model by which `auto` chooses.

microseconds = launch * launches + gbyte * GB moved + gflop * GFLOP computed, over the base alone,
of what the strategy's graph does beside the base's product. The three are fitted to measured layers
(`loraexport bench --calibrate`), so that they stand for a device; costs.json has an H200's. The
kernels of loraexport-kernels have three of their own, there an H100's.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from loraexport_runtime.contract.foreign import MAX_BYTES, read_bounded
from loraexport_runtime.contract.manifest import Strategy

from ..errors import UsageError
from ..spec.schema import Costs, CostTerms

COSTS_FILE = Path(__file__).with_name("costs.json")
_CHUNK = 64
"""Of the chunked strategy, in tokens."""
WITH_KERNELS: tuple[Strategy, ...] = ("augmented", "masked")
"""Strategies whose sites are functions that kernels may take (export.kernels)."""
_LEAST_MEASURED = 6


@dataclass(frozen=True)
class LayerShape:
    """A linear layer and a batch: T tokens, `slots`, rows of a stack per slot."""

    tokens: int
    in_features: int
    out_features: int
    slots: int
    rows_per_slot: float
    """On average."""
    bytes_per_value: int
    has_bias: bool = False


def read_costs(path: Path = COSTS_FILE) -> Costs:
    """Raises UsageError for a file that is none of `loraexport bench --calibrate`."""
    try:
        return Costs.model_validate_json(read_bounded(path, MAX_BYTES))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a calibration's costs.json") from error
    except ValidationError as error:
        raise UsageError(
            f"{path}: no costs of 'loraexport bench --calibrate': {error.errors()[0]['msg']}"
        ) from error


def work(
    strategy: Strategy, shape: LayerShape, with_kernels: bool = False
) -> tuple[int, float, float]:
    """(launches, GB, GFLOP) beside the base's product, with W the rows of a slot, K those of all.

    masked: shrink, where, a copy of y, expand over it. augmented: shrink, where, [x | h], and K
    more columns in the base's product, less that one's pass for its bias. chunked, P places in
    chunks: gathers of x, A and B, two batched products, a gather back, where, add. segmented runs
    its loop: no model of it.

    With kernels, which take the functions of masked and augmented sites, and S slots in use: a
    shrink over each token's own slot, and an expand that adds to y: x, y and S times A and B are
    read, h is written and read in float32, y written. augmented brings the bias along, for which
    the base's product has a pass of its own.
    """
    if with_kernels:
        return _kernels_work(strategy, shape)
    tokens, size_in, size_out = shape.tokens, shape.in_features, shape.out_features
    width, every = shape.rows_per_slot, shape.rows_per_slot * shape.slots
    select = tokens * size_in + 3.5 * tokens * every + every * size_in  # the shrink, and where
    values, flops, launches = select + every * size_out, 0.0, 0
    if strategy == "masked":
        launches, values = 4, values + tokens * every + 4 * tokens * size_out
        flops = 2 * tokens * every * (size_in + size_out)
    elif strategy == "augmented":
        launches, values = 3, values + 2 * tokens * (size_in + every) + tokens * every
        if shape.has_bias:  # the base's product gets it by a pass of its own over y
            launches, values = 2, values - 2 * tokens * size_out
        flops = 2 * tokens * every * (size_in + size_out)
    elif strategy == "chunked":
        chunks = tokens // _CHUNK + shape.slots
        places = chunks * _CHUNK
        moved = places * (3 * size_in + size_out + 2 * width) + 7 * tokens * size_out
        launches, values = 9, moved + 3 * chunks * width * (size_in + size_out)
        flops = 2 * places * width * (size_in + size_out)
    else:
        raise ValueError(f"no cost of {strategy!r}")
    return launches, values * shape.bytes_per_value / 1e9, flops / 1e9


def _kernels_work(strategy: Strategy, shape: LayerShape) -> tuple[int, float, float]:
    tokens, size_in, size_out = shape.tokens, shape.in_features, shape.out_features
    width, used = shape.rows_per_slot, min(shape.slots, tokens)
    launches, values = 2, tokens * (size_in + 2 * size_out) + used * width * (size_in + size_out)
    if strategy == "augmented" and shape.has_bias:
        launches, values = 1, values - 2 * tokens * size_out
    elif strategy not in WITH_KERNELS:
        raise ValueError(f"no kernels of {strategy!r}")
    moved = values * shape.bytes_per_value + 2 * 4 * tokens * width
    return launches, moved / 1e9, 2 * tokens * width * (size_in + size_out) / 1e9


@dataclass(frozen=True)
class Measured:
    """A layer that was timed, in microseconds."""

    strategy: Strategy
    shape: LayerShape
    added: float
    base: float
    """The base alone."""
    with_kernels: bool = False


def added(costs: Costs, strategy: Strategy, shape: LayerShape, with_kernels: bool = False) -> float:
    """Microseconds that the strategy adds to the base alone.

    Args:
        with_kernels: taken by kernels, whose terms the costs have.
    """
    terms = costs.kernels if with_kernels else costs
    assert terms is not None, "whoever asks has looked for the kernels' terms"
    launches, gbytes, gflops = work(strategy, shape, with_kernels)
    return terms.launch * launches + terms.gbyte * gbytes + terms.gflop * gflops


def is_apart(costs: Costs, shape: LayerShape, slices: int) -> bool:
    """Whether a product for each slice costs less than one for all, and y's split after it."""
    moved = 2 * shape.tokens * shape.out_features * shape.bytes_per_value
    return costs.launch * (slices - 1) < costs.launch + costs.gbyte * moved / 1e9


def fit(device: str, measured: Sequence[Measured]) -> Costs:
    """The terms of stock operators, and of kernels where layers were timed with them.

    Raises:
        UsageError: too few measurements.
    """
    stock = _fit([one for one in measured if not one.with_kernels], "", "h200")
    timed = [one for one in measured if one.with_kernels]
    kernels = _fit(timed, " with kernels", "kernels") if timed else None
    return Costs(**stock.model_dump() | {"device": device}, kernels=kernels)


def _fit(measured: Sequence[Measured], which: str, example: str) -> CostTerms:
    """The three of least squared error, relative to the whole layer's time; none below 0."""
    if len(measured) < _LEAST_MEASURED:
        raise UsageError(
            f"{len(measured)} measured layers{which} are too few to calibrate; run workloads of"
            " kind layers on CUDA with several tokens and adapters, as"
            f" specs/bench/{example}.yaml does"
        )
    whole = np.array([measurement.base + measurement.added for measurement in measured])
    works = [work(one.strategy, one.shape, one.with_kernels) for one in measured]
    rows = np.array(works) / whole[:, None]
    targets = np.array([measurement.added for measurement in measured]) / whole
    best, least = np.zeros(3), np.inf
    for size in (1, 2, 3):  # least squares on a face of the positive octant
        for chosen in itertools.combinations(range(3), size):
            part, *_ = np.linalg.lstsq(rows[:, chosen], targets, rcond=None)
            error = float(((rows[:, chosen] @ part - targets) ** 2).sum())
            if (part >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[list(chosen)] = part
    launch, gbyte, gflop = (float(f"{cost:.4g}") for cost in best)
    return CostTerms(launch=launch, gbyte=gbyte, gflop=gflop)
