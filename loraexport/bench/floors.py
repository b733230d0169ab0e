"""The least that the sites of a batch have to move and to compute, from the plan's own numbers."""

from typing import Literal

from ..plan.layers import BYTES_PER_VALUE
from ..plan.plan import Plan
from .device import Device
from .results import Floor

_ALL_SLOTS = ("masked", "augmented")
"""Strategies that multiply every token by the factors of all slots; none has to."""


def site_floors(
    plan: Plan, tokens: int, used: int, device: Device, units: int = 1
) -> dict[Literal["base", "mixed"], Floor]:
    """Floors of the base and of LoRA on top of it, for one of `units` equal layers of the plan.

    W, and A and B of the `used` adapters, are read once; x is read and y written once; each token
    is multiplied by W and by its own A and B. What lies between the sites (attention, norms) is
    not counted.
    """
    size = BYTES_PER_VALUE[plan.spec.export.dtype]
    base_bytes = base_flops = lora_bytes = lora_flops = 0
    for one in plan.layers:
        base_bytes += one.base_bytes + size * tokens * (
            one.layer.in_features + one.layer.out_features
        )
        base_flops += one.base_flops_per_token * tokens
        lora_bytes += one.lora_bytes * used // one.num_slots
        per_token = one.lora_flops_per_token
        if one.layer.strategy in _ALL_SLOTS:
            per_token //= one.num_slots
        lora_flops += per_token * tokens
    dtype = plan.spec.export.dtype
    return {
        "base": device.floor(base_bytes // units, base_flops // units, dtype),
        "mixed": device.floor(
            (base_bytes + lora_bytes) // units, (base_flops + lora_flops) // units, dtype
        ),
    }
