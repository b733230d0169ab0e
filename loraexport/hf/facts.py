"""A Hugging Face directory's config files -> what a service has to know of the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from loraexport_runtime.contract.kinds import Facts, ProblemType

from ..errors import BaseModelError

_NO_LIMIT = 10**9
"""A tokenizer that knows no limit says 1e30."""
_OFFSET_TYPES = ("camembert", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta")
"""Their first positions, up to the padding's own, are of no token."""


def read_facts(directory: Path) -> Facts:
    """What the files say that are there; a file that is absent says nothing.

    Raises:
        BaseModelError: a file is no JSON object, or a value is of another type than it should be.
    """
    config = _File(directory / "config.json")
    sentences = _File(directory / "config_sentence_transformers.json")
    prompts = sentences.texts("prompts")
    default = sentences.text("default_prompt_name")
    if default is not None and default not in prompts:
        raise BaseModelError(
            f"{sentences.path}: default_prompt_name is {default!r}, but prompts has"
            f" {', '.join(prompts) or 'none'}; correct one of them"
        )
    problem = config.text("problem_type")
    known = get_args(ProblemType)
    if problem is not None and problem not in known:
        raise BaseModelError(
            f"{config.path}: problem_type is {problem!r}; expected one of {', '.join(known)}"
        )
    return Facts(
        max_length=_max_length(directory, config),
        vocab_size=config.number("vocab_size"),
        pad_token_id=config.number("pad_token_id"),
        id2label=config.texts("id2label"),
        problem_type=problem,  # type: ignore[arg-type]
        prompts=prompts,
        default_prompt_name=default,
    )


def _max_length(directory: Path, config: "_File") -> int | None:
    """The least of what the model, its tokenizer and sentence-transformers allow."""
    positions = config.number("max_position_embeddings") or config.number("n_positions")
    if positions is not None and config.text("model_type") in _OFFSET_TYPES:
        positions -= (config.number("pad_token_id") or 0) + 1
    limits = [
        positions,
        _File(directory / "tokenizer_config.json").number("model_max_length"),
        _File(directory / "sentence_bert_config.json").number("max_seq_length"),
    ]
    return min((limit for limit in limits if limit and 0 < limit < _NO_LIMIT), default=None)


class _File:
    """One JSON object, read by the types that its values should have; null is as absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = _read_object(path)

    def number(self, key: str) -> int | None:
        value = self._values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self._typed(key, value, int, "an integer")

    def text(self, key: str) -> str | None:
        return self._typed(key, self._values.get(key), str, "a text")

    def texts(self, key: str) -> dict[str, str]:
        values: dict[str, Any] = self._typed(key, self._values.get(key), dict, "an object") or {}
        for text in values.values():
            if not isinstance(text, str):
                raise self._error(key, "texts", text)
        return values

    def _typed(self, key: str, value: Any, kind: type, expected: str) -> Any:
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        raise self._error(key, expected, value)

    def _error(self, key: str, expected: str, value: object) -> BaseModelError:
        return BaseModelError(f"{self.path}: {key}: expected {expected}, got {value!r}; correct it")


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise BaseModelError(f"{path}: expected an object, got {str(values)[:40]}; fetch it again")
    return values
