"""The least that the sites of a batch have to move and to compute, from the plan's own numbers."""

from typing import Literal

from ..plan.plan import AnyPlan
from ..plan.stacks import BYTES_PER_VALUE
from .device import Device
from .results import Floor

# Bytes/s, and dense FLOP/s by dtype, from NVIDIA's data sheets; the first name that fits.
_PEAKS = {
    "H200": (4.8e12, {"float32": 67e12, "float16": 989e12, "bfloat16": 989e12}),
    "H100": (3.35e12, {"float32": 67e12, "float16": 989e12, "bfloat16": 989e12}),
    "A100": (2.0e12, {"float32": 19.5e12, "float16": 312e12, "bfloat16": 312e12}),
}
_ALL_SLOTS = ("masked", "augmented")
"""Strategies that multiply every token by the factors of all slots; none has to."""
_INT4_BLOCK = 32
"""Values of one scale, in the graphs of onnxruntime-genai's model builder."""


def site_floors(
    plan: AnyPlan,
    tokens: int,
    used: int,
    device: Device,
    units: int = 1,
    rank_share: float = 1.0,
) -> dict[Literal["base", "mixed"], Floor]:
    """Floors of the base and of LoRA on top of it, for one of `units` equal layers of the plan.

    W, and A and B of the `used` adapters, are read once; x is read and y written once; each token
    is multiplied by W and by its own A and B. What lies between the sites (attention, norms) is
    not counted.

    Args:
        rank_share: of a slot's ranks those that its adapter has, in the mean.
    """
    size = BYTES_PER_VALUE[plan.spec.export.dtype]
    base_bytes = base_flops = lora_bytes = lora_flops = 0
    for layer in plan.layers:
        base_bytes += _weight_bytes(plan, layer.base_bytes) + size * tokens * (
            layer.layer.in_features + layer.layer.out_features
        )
        base_flops += layer.base_flops_per_token * tokens
        lora_bytes += layer.lora_bytes * used // layer.num_slots
        per_token = layer.lora_flops_per_token
        if layer.layer.strategy in _ALL_SLOTS:
            per_token //= layer.num_slots
        lora_flops += per_token * tokens
    lora_bytes, lora_flops = int(rank_share * lora_bytes), int(rank_share * lora_flops)
    dtype = plan.spec.export.dtype
    return {
        "base": floor(device, base_bytes // units, base_flops // units, dtype),
        "mixed": floor(
            device, (base_bytes + lora_bytes) // units, (base_flops + lora_flops) // units, dtype
        ),
    }


def _weight_bytes(plan: AnyPlan, nbytes: int) -> int:
    """Of a layer's weight whose values, in the export's dtype, take so many."""
    base = plan.spec.base
    if base.kind != "causal_lm" or base.weights == "float":
        return nbytes
    return nbytes // (2 * BYTES_PER_VALUE[plan.spec.export.dtype]) + nbytes // _INT4_BLOCK


def floor(device: Device, nbytes: int, flops: int, dtype: str) -> Floor:
    """The least time for so many bytes and FLOPs, if the device's peak is known."""
    peak = next((figures for name, figures in _PEAKS.items() if name in device.name), None)
    seconds = None
    if peak is not None and device.kind == "cuda":
        seconds = max(nbytes / peak[0], flops / peak[1][dtype])
    return Floor(bytes=nbytes, flops=flops, seconds=seconds)
