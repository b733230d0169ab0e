"""A manifest of format 4 -> the same in the words of format 5, before it is parsed.

Format 4 had `kind` in the spec's words, and beside it `model` and `generator`, null where they do
not apply; it kept nothing for a service.
"""

from typing import Any

FORMAT = 4

_PARTS: dict[Any, list[tuple[str, ...]]] = {
    "layers": [()],
    "transformers": [("model",)],
    "causal_lm": [("generator",)],
    "onnx": [("model",), ("generator",)],
}
"""Kind -> what of `model` and `generator` it has."""
_NO_NAMING: dict[str, Any] = {"architecture": None, "prefixes": [], "other_parts": []}
_NO_FACTS: dict[str, Any] = {
    "max_length": None,
    "vocab_size": None,
    "pad_token_id": None,
    "id2label": {},
    "problem_type": None,
    "prompts": {},
    "default_prompt_name": None,
    "max_box": None,
    "positions": None,
    "type_vocab_size": None,
}

_NO_DECODER_FACTS: dict[str, Any] = {
    "blend": False,
    "steps": None,
    "max_length": None,
    "vocab_size": None,
    "lengths": [],
    "reread_length": None,
}


def upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """The manifest as an object of format 5; `format_version` stays what it was.

    Raises:
        ValueError: a key is missing, or two contradict each other.
    """
    missing = [key for key in ("kind", "model", "generator") if key not in data]
    if missing:
        raise ValueError(f"manifest: key {missing[0]!r} is missing")
    remaining = {key: value for key, value in data.items() if key not in ("model", "generator")}
    word, parts = (
        data["kind"],
        tuple(key for key in ("model", "generator") if data[key] is not None),
    )
    if not isinstance(word, str) or word not in _PARTS:
        raise ValueError(f"manifest.kind: expected one of {tuple(_PARTS)}, got {word!r}")
    if parts not in _PARTS[word]:
        raise ValueError(
            f"manifest: {' and '.join(parts) or 'layers alone'} does not fit kind {word!r}"
        )
    if isinstance(remaining.get("parity"), dict):
        remaining["parity"] = remaining["parity"] | {"gain_tolerance": None}
    if isinstance(remaining.get("base"), dict):
        remaining["base"] = remaining["base"] | {"naming": _NO_NAMING, "missing": []}
    return remaining | {"kind": _kind(word, data["model"], data["generator"])}


def _kind(word: str, model: Any, generator: Any) -> dict[str, Any]:
    if generator is not None:
        decoder = _with(generator, _NO_DECODER_FACTS)
        if isinstance(decoder, dict):
            decoder.pop("pad_token_id", None)  # a token that no prompt could hold
        return {"decoder": decoder}
    if model is None:
        return {"layers": {}}
    whole = _with(model, {"facts": _NO_FACTS})
    return {"graph": {"model": whole}} if word == "onnx" else {"model": whole}


def _with(values: Any, more: dict[str, Any]) -> Any:
    """What is no object is left to the parser."""
    return values | more if isinstance(values, dict) else values
