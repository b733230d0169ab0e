"""What a step's graph gives for the next step, by the input that it is for."""

from collections.abc import Collection

from ...contract.kinds import LENGTHS

NO_TOKEN = -1
"""What a step gives in place of a token where a logit of the row is NaN."""


def next_inputs(input_names: Collection[str]) -> dict[str, str]:
    """Input of a step -> the output for the next one; `input_names`: the decoder's."""
    masks = [name for name in ("attention_mask", "position_ids") if name in input_names]
    return {name: f"loraexport/next/{name}" for name in ("input_ids", LENGTHS, *masks)}
