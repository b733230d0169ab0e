"""Which strategy, and why."""

import functools
from typing import Literal

from loraexport_runtime.contract.manifest import Strategy

from ..spec.schema import Costs, Spec
from .costs import WITH_KERNELS, LayerShape, added, read_costs
from .stacks import BYTES_PER_VALUE

_NO_KERNEL_COSTS = "; by stock operators, as these costs have no terms of the kernels"
_own_costs = functools.cache(read_costs)  # every layer of a plan asks for them


def choose_strategy(
    kind: Literal["linear", "embedding"],
    spec: Spec,
    num_slots: int,
    rows_per_slot: float,
    in_size: int,
    out_size: int,
    has_bias: bool = False,
) -> tuple[Strategy, str]:
    """The strategy of a layer, and why.

    `auto` takes what costs least on the GPU that `tune` names (see costs.py): of a whole model or
    a decoder masked or augmented, which share their mask, of a single layer chunked too. With
    export.kernels it goes by the kernels' costs, where these are known, and never takes chunked,
    for which there are none. On a CPU masked costs 1.3 to 1.7 times the base, augmented 2 to 3.2.
    """
    requested, tune, tokens = spec.export.strategy, spec.export.tune, spec.typical_tokens
    if spec.export.blend:
        return "masked", "the mask holds each row's weights of the slots"
    if spec.base.kind == "onnx":
        return "masked", "it joins a graph that exists, whose products stay as they are"
    if spec.base.kind == "causal_lm" and spec.base.weights == "int4":
        return "masked", "a product of int4 weights cannot take B too"
    if spec.base.kind == "causal_lm" and requested in ("segmented", "chunked"):
        return "masked", f"it joins a graph that exists, which {requested} cannot"
    if requested == "augmented" and kind == "embedding":
        return "masked", "an embedding has no [W ; B] product; masked is its nearest form"
    if requested != "auto":
        return requested, "the spec asks for it"
    if tune.device == "cpu":
        return "masked", "on a CPU masked costs least: augmented is never prepacked"
    if kind == "embedding":
        return "masked", "its shrink is a gather, so only the expand is a product"
    costs = costs_of(spec)
    size = BYTES_PER_VALUE[spec.export.dtype]
    shape = LayerShape(tokens, in_size, out_size, num_slots, rows_per_slot, size, has_bias)
    candidates = list(WITH_KERNELS)
    if spec.base.kind == "layers" and not spec.export.kernels:
        candidates.append("chunked")
    terms = costs.kernels if spec.export.kernels else None
    by_kernels, device = terms is not None, f"one {costs.device}"
    if terms is not None:
        device = f"the kernels on one {terms.device or costs.device}"
    extra = {candidate: added(costs, candidate, shape, by_kernels) for candidate in candidates}
    best, *costlier = sorted(candidates, key=lambda candidate: extra[candidate])
    comparison = ", ".join(f"{candidate} {extra[candidate]:.1f}" for candidate in costlier)
    return best, (
        f"least by the costs of {device} for {tokens} tokens and {num_slots} slots:"
        f" {extra[best]:.1f} us over the base; {comparison}"
        f"{'' if by_kernels or not spec.export.kernels else _NO_KERNEL_COSTS}"
    )


def costs_of(spec: Spec) -> Costs:
    return spec.export.tune.costs or _own_costs()
