"""The overridable initializers of a layer."""

from collections.abc import Collection, Mapping, Sequence

from loraexport_runtime.contract.manifest import BIAS_ROWS, Layer, Stack, Strategy

from ..spec.schema import Spec

LORA = ("lora_A", "lora_B")
ROW_STEP = 8
"""Rows of a stack are so many together that products read them fastest."""
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}


def make_stacks(
    layer: Layer,
    strategy: Strategy,
    num_slots: int,
    widths: Sequence[int],
    roles: Collection[str] = LORA,
    has_bias: bool = False,
    slot_rows: tuple[int, ...] | None = None,
) -> tuple[Stack, ...]:
    """The overridable initializers of a layer; every slot is one block of whole rows.

    Args:
        widths: the columns of each stack of role lora_B, side by side.
        slot_rows: as of `make_layer_plan`.
    """
    size_in, size_out = layer.in_features, layer.out_features
    rows = len(layer.slices) * layer.max_rank if "lora_A" in roles else 0
    is_augmented = strategy == "augmented"
    of_bias = BIAS_ROWS if is_augmented and has_bias else 0
    # Role -> width, rows of a slot, rows of the base ahead of them.
    sizes = {
        "lora_A": (rows, size_in, 0) if layer.kind == "embedding" else (size_in, rows, of_bias),
        "lora_B": (size_out, rows, size_in + of_bias if is_augmented else 0),
        "output_scale": (size_out, 1, 1),
        "bias": (size_out, 1, 1),
        "weight": (size_in, size_out, size_out),
    }
    stacks = []
    for role, (whole, per_slot, ahead) in sizes.items():
        if role in roles:
            name = f"{layer.name}.{'weight_lora_B' if role == 'lora_B' and ahead else role}"
            left = 0
            own = slot_rows if role in LORA else None
            for index, width in enumerate(widths if role == "lora_B" else [whole]):
                shape = (ahead + sum(own or [per_slot] * num_slots), width)
                end = f".{index}" if width < whole else ""
                stacks.append(Stack(f"{name}{end}", role, shape, per_slot, ahead, left, own))  # type: ignore[arg-type]
                left += width
    return tuple(stacks)


def true_rows(
    layer: Layer, adapters: Sequence[Mapping[str, int]], spec: Spec
) -> tuple[int, ...] | None:
    """The rows that each adapter takes of a layer's stacks, in eights for alignment.

    None where all slots are to have room for any adapter of max_rank: a spec that gives slots,
    sites or max_rank asks for that.

    Args:
        adapters: the rank at every site, of each adapter in its slot's order.
    """
    if (spec.slots, spec.sites, spec.max_rank) != (None, None, None):
        return None
    sums = [sum(ranks.get(part.site, 0) for part in layer.slices) for ranks in adapters]
    return tuple(-(-rows // ROW_STEP) * ROW_STEP for rows in sums)
