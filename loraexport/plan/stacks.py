"""The overridable initializers of a layer."""

from collections.abc import Collection, Sequence

from loraexport_runtime.contract.manifest import BIAS_ROWS, Layer, Stack, Strategy

LORA = ("lora_A", "lora_B")
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}


def make_stacks(
    layer: Layer,
    strategy: Strategy,
    num_slots: int,
    widths: Sequence[int],
    roles: Collection[str] = LORA,
    has_bias: bool = False,
) -> tuple[Stack, ...]:
    """The overridable initializers of a layer; every slot is one block of whole rows.

    Args:
        widths: the columns of each stack of role lora_B, side by side.
    """
    size_in, size_out = layer.in_features, layer.out_features
    rows = len(layer.slices) * layer.max_rank if "lora_A" in roles else 0
    is_table = layer.kind == "embedding"
    is_augmented = strategy == "augmented"
    of_bias = BIAS_ROWS if is_augmented and has_bias else 0
    # Role -> width, rows of a slot, rows of the base ahead of them.
    sizes = {
        "lora_A": (rows, size_in, 0) if is_table else (size_in, rows, of_bias),
        "lora_B": (size_out, rows, size_in + of_bias if is_augmented else 0),
        "output_scale": (size_out, 1, 1),
        "bias": (size_out, 1, 1),
        "weight": (size_out, size_in, size_in) if is_table else (size_in, size_out, size_out),
    }
    stacks = []
    for role, (whole, per_slot, ahead) in sizes.items():
        if role in roles:
            name = f"{layer.name}.{'weight_lora_B' if role == 'lora_B' and ahead else role}"
            column = 0
            for index, width in enumerate(widths if role == "lora_B" else [whole]):
                shape = (ahead + per_slot * num_slots, width)
                end = f".{index}" if width < whole else ""
                stacks.append(
                    Stack(f"{name}{end}", role, shape, per_slot, ahead, column)  # type: ignore[arg-type]
                )
                column += width
    return tuple(stacks)
