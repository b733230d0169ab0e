"""What an ONNX graph may take, for its numbers to be proven."""

import onnx_ir as ir

from loraexport_runtime.contract.kinds import TensorEntry

from ..errors import BaseModelError

_KNOWN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values")
GRAPH_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "INT64": "int64"}
"""onnx's names -> a manifest's."""


def input_entry(value: ir.Value, label: str) -> TensorEntry:
    """What a graph's input holds.

    Raises:
        BaseModelError: it is none that can be made up, or it is fixed to some rows or tokens.
    """
    name, shape = str(value.name), value.shape
    dtype = GRAPH_DTYPES.get(value.dtype.name if value.dtype is not None else "")
    if name.startswith("past_key_values"):
        raise BaseModelError(
            f"{label}: it takes a cache ({name}), but no genai_config.json lies beside it; make its"
            " folder with onnxruntime-genai's model builder, or export the model without a cache"
        )
    if name not in _KNOWN_INPUTS or dtype is None or shape is None:
        raise BaseModelError(
            f"{label}: it takes {name!r} ({value.dtype}); known are {', '.join(_KNOWN_INPUTS)} in"
            " int64, float32 and float16, so that nothing could be proven. Export it with these"
        )
    if isinstance(shape[0], int) or (name != "pixel_values" and isinstance(shape[1], int)):
        raise BaseModelError(
            f"{label}: {name} has the fixed shape {shape}; export it with dynamic axes for"
            " the batch and the sequence"
        )
    sizes = ("batch", *map(str, shape[1:])) if name == "pixel_values" else ("batch", "sequence")
    return TensorEntry(name, dtype, sizes)  # type: ignore[arg-type]
