"""A vector for each text: which output is one, the model's own prompts, and shorter vectors."""

from collections.abc import Mapping, Sequence

import numpy as np

from loraexport_runtime.contract.kinds import Model, TensorEntry

from ..errors import invalid
from .encoder import EncoderHost, Row
from .texts import TextEncoder, Tokens, check_length

_SYNONYMS = {
    "query": ("query", "search_query"),
    "search_query": ("search_query", "query"),
    "document": ("document", "passage", "search_document"),
    "passage": ("passage", "document", "search_document"),
    "search_document": ("search_document", "document", "passage"),
}
"""Kinds of inputs as Cohere's and NVIDIA's clients name them -> names of prompts, the first that
there is."""


def vector_output(host: EncoderHost) -> str:
    """The output that is a text's vector. Raises ApiError (400): it has none."""
    model = host.model
    if model.task in ("sequence-classification", "token-classification"):
        raise invalid(f"`{host.name}` gives labels, not vectors; ask /v1/classify", "model")
    found = vector_outputs(model)
    if len(found) == 1:
        return found[0].name
    gives = ", ".join(map(str, model.outputs))
    raise invalid(
        f"`{host.name}` gives {gives}, and no single vector for a text; build it with task:"
        " sentence-embedding",
        "model",
    )


def vector_outputs(model: Model) -> list[TensorEntry]:
    """The outputs that are a vector for each row."""
    return [
        entry
        for entry in model.outputs
        if len(entry.shape) == 2 and entry.shape[0] == "batch" and entry.shape[1].isdigit()
    ]


def width(model: Model, output: str) -> int:
    """The numbers of a vector."""
    return next(int(entry.shape[1]) for entry in model.outputs if entry.name == output)


def choose_prompt(
    prompts: Mapping[str, str], default: str | None, name: str | None, kind: str | None
) -> str:
    """What stands ahead of a text; "" for nothing.

    Args:
        prompts: the model's own, by name.
        default: the name of that which is taken where a request says nothing.
        name: `prompt_name`.
        kind: `input_type`; a model without prompts takes every one, as it treats them alike.

    Raises:
        ApiError: 400: it has no such prompt, or both are given.
    """
    if name is not None and kind is not None:
        raise invalid("prompt_name and input_type are both given; give one", "prompt_name")
    if name is not None:
        if name not in prompts:
            known = ", ".join(prompts) or "none"
            raise invalid(f"prompt_name `{name}`: the model's prompts are {known}", "prompt_name")
        return prompts[name]
    if kind is not None:
        names = _SYNONYMS.get(kind, (kind,))
        found = next((prompts[one] for one in names if one in prompts), None)
        if found is None and prompts:
            known = ", ".join(prompts)
            raise invalid(f"input_type `{kind}`: the model's prompts are {known}", "input_type")
        return found or ""
    return prompts[default] if default is not None else ""


def read_rows(
    texts: TextEncoder, inputs: Sequence[str], prompt: str, cut: int | None, special: bool
) -> list[Row]:
    """Texts behind a prompt as rows. Raises ApiError (400)."""
    whole = [prompt + text for text in inputs] if prompt else inputs
    length = texts.prompt_length(prompt) if prompt else 0
    return [
        Row(tokens, min(length, len(tokens.ids)))
        for tokens in texts.encode(whole, cut=cut, special=special)
    ]


def rows_of_ids(
    ids: Sequence[Sequence[int]],
    cut: int | None,
    vocabulary: int,
    limit: int | None,
) -> list[Row]:
    """Token ids as rows, as they are. Raises ApiError (400)."""
    rows = []
    for index, row in enumerate(ids):
        if not row:
            raise invalid(f"input[{index}] has no tokens", "input")
        for token in row:
            if not 0 <= token < vocabulary:
                message = f"input[{index}]: token {token}; expected 0 to {vocabulary - 1}"
                raise invalid(message, "input")
        kept = list(row) if cut is None else list(row[:cut])
        if cut is None:
            check_length(len(kept), limit, index)
        rows.append(Row(Tokens(kept, [0] * len(kept))))
    return rows


def shorten(vectors: np.ndarray, size: int) -> np.ndarray:
    """The first `size` numbers of each vector [n, width], each of length 1 again."""
    cut = vectors[:, :size].astype(np.float32)
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(cut / np.maximum(norms, 1e-12))
