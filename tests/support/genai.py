"""A genai_config.json with all that this project reads of one."""

from typing import Any


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
