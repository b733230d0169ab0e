"""A genai_config.json with all that this project reads of one, and a cache for its graph."""

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper


def genai_config(**model: Any) -> dict[str, Any]:
    """The config of a tiny decoder; `model`: keys of its model that differ."""
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size")
    parts = ("key", "value")
    decoder = {
        "filename": "model.onnx",
        "inputs": {f"past_{part}_names": f"past_key_values.%d.{part}" for part in parts},
        "outputs": {f"present_{part}_names": f"present.%d.{part}" for part in parts},
        **dict.fromkeys(sizes, 2),
    }
    defaults = {
        "context_length": 128,
        "vocab_size": 320,
        "eos_token_id": [2, 3],
        "decoder": decoder,
    }
    return {"model": defaults | model, "search": {}}


def add_cache(file: Path) -> None:
    """Give a graph the cache that `genai_config` speaks of; what comes in goes out."""
    model = onnx.load(file)
    for layer in range(2):
        for part in ("key", "value"):
            names = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            for name, values in zip(names, (model.graph.input, model.graph.output), strict=True):
                shape = ["batch", 2, f"{name}_length", 2]
                values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            model.graph.node.append(helper.make_node("Identity", names[:1], names[1:]))
    onnx.save(model, file)
