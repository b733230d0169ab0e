"""What a decoder should give: its logits and greedy tokens, every prompt alone, without padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save

from loraexport_runtime.checking.decoder_cases import STEPS, DecoderReference, make_cases
from loraexport_runtime.checking.model import BASE, Mix
from loraexport_runtime.checking.stored import CASES_FILE
from loraexport_runtime.contract.genai_config import end_tokens
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.rope import tokens_until_reread

from .cases import make_prompts

_MOST_COLUMNS = 8192
_TOP = 16


@dataclass(frozen=True)
class Text:
    """A prompt, and what it uses."""

    mix: Mix
    prompt: tuple[int, ...]


class ReferenceDecoder(Protocol):
    """A decoder that reads each text by itself, with one adapter or none."""

    source: str
    """How a report speaks of it."""

    def greedy(self, texts: Sequence[Text]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The likeliest tokens int64 [STEPS] after each, and what each of them was chosen from,
        [STEPS, vocabulary]."""

    def logits(self, texts: Sequence[Text], tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        """[STEPS, vocabulary] of each text: what each of its `tokens` would be chosen from."""


def make_reference(
    plain: ReferenceDecoder, manifest: Manifest, config: Mapping[str, Any], seed: int
) -> DecoderReference:
    """Run a decoder on every prompt of every case; `config`: onnxruntime-genai's."""
    special = [*end_tokens(config), config.get("bos_token_id")]
    avoid = [token for token in special if isinstance(token, int)]
    cases = make_cases(manifest)
    prompts = {case.name: make_prompts(case, config["vocab_size"], avoid, seed) for case in cases}
    texts = [
        Text(mix, tuple(prompt))
        for case in cases
        for mix, prompt in zip(case.rows, prompts[case.name], strict=True)
    ]
    chosen = plain.greedy(texts)
    adapted = [index for index, text in enumerate(texts) if text.mix != BASE]
    base_texts = [Text(BASE, texts[index].prompt) for index in adapted]
    base = dict(
        zip(adapted, plain.logits(base_texts, [chosen[i][0] for i in adapted]), strict=True)
    )
    tokens, logits, base_logits = {}, {}, {}
    start = 0
    for case in cases:
        rows = range(start, start + len(case.rows))
        tokens[case.name] = np.stack([chosen[row][0] for row in rows])
        logits[case.name] = np.stack([chosen[row][1] for row in rows])
        base_logits[case.name] = np.stack([base.get(row, chosen[row][1]) for row in rows])
        start = rows.stop
    columns = _choose_columns(logits, seed)
    stored = [
        {case: values[..., columns] for case, values in every.items()}
        for every in (logits, base_logits)
    ]
    return DecoderReference(plain.source, columns, prompts, tokens, *stored)


def _choose_columns(logits: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    """All of a small vocabulary, else some by chance and the likeliest of every step."""
    every = np.concatenate([logit.reshape(-1, logit.shape[-1]) for logit in logits.values()])
    vocabulary = every.shape[1]
    if vocabulary <= _MOST_COLUMNS:
        return np.arange(vocabulary)
    likeliest = np.argpartition(-every, _TOP, axis=1)[:, :_TOP]
    chance = np.random.default_rng(seed).choice(vocabulary, _MOST_COLUMNS // 2, replace=False)
    return np.union1d(likeliest, chance)


def parts_read(length: int, reread_length: int | None) -> list[tuple[int, int]]:
    """(tokens chosen, those of them that are new) of each reading that STEPS tokens after a prompt
    of `length` take: one, or two if the text outgrows `reread_length` meanwhile."""
    first = min(tokens_until_reread(length, reread_length) or STEPS, STEPS)
    return [(first, first)] if first == STEPS else [(first, first), (STEPS, STEPS - first)]


def save_reference(reference: DecoderReference, folder: Path) -> None:
    """Keep prompts, tokens and logits (as float32) in the artifact."""
    arrays: dict[str, np.ndarray] = {"columns": reference.columns}
    for case, prompts in reference.prompts.items():
        arrays |= {f"{case}/x/{row}": np.array(prompt) for row, prompt in enumerate(prompts)}
        arrays[f"{case}/tokens"] = reference.tokens[case]
        # In C's order: safetensors writes the memory as it lies.
        arrays[f"{case}/y"] = reference.logits[case].astype(np.float32, order="C")
        arrays[f"{case}/base"] = reference.base_logits[case].astype(np.float32, order="C")
    (folder / CASES_FILE).parent.mkdir(exist_ok=True)
    (folder / CASES_FILE).write_bytes(save(arrays))
