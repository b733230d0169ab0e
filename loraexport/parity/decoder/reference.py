"""What a decoder should give: its logits and greedy tokens, every prompt alone, without padding."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import save

from loraexport_runtime.checking.decoder import DecoderReference, make_cases
from loraexport_runtime.checking.model import BASE, Mix
from loraexport_runtime.checking.stored import CASES_FILE
from loraexport_runtime.contract.genai_config import end_tokens
from loraexport_runtime.contract.manifest import Manifest

from .cases import make_prompts

_MOST_COLUMNS = 8192
_TOP = 16


class ReferenceDecoder(Protocol):
    """A decoder that runs one prompt at a time, with one adapter or none."""

    source: str
    """How a report speaks of it."""

    def using(self, mix: Mix) -> AbstractContextManager[None]:
        """Until the end of the block every prompt runs with what `mix` says."""

    def greedy(self, prompt: Sequence[int]) -> np.ndarray:
        """The likeliest tokens int64 [STEPS] after a prompt."""

    def logits(self, prompt: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """[STEPS, vocabulary]: what each of `tokens` was chosen from."""


def make_reference(
    plain: ReferenceDecoder, manifest: Manifest, config: Mapping[str, Any], seed: int
) -> DecoderReference:
    """Run a decoder on every prompt of every case; `config`: onnxruntime-genai's."""
    special = [*end_tokens(config), config["pad_token_id"], config.get("bos_token_id")]
    avoid = [token for token in special if isinstance(token, int)]
    prompts, tokens, logits, base_logits = {}, {}, {}, {}
    for case in make_cases(manifest):
        own = make_prompts(case, config["vocab_size"], avoid, seed)
        chosen: dict[int, np.ndarray] = {}
        given: dict[int, np.ndarray] = {}
        for mix in set(case.rows):
            with plain.using(mix):
                for row, prompt in enumerate(own):
                    if case.rows[row] == mix:
                        chosen[row] = plain.greedy(prompt)
                        given[row] = plain.logits(prompt, chosen[row])
        rows = range(len(own))
        prompts[case.name] = own
        tokens[case.name] = np.stack([chosen[row] for row in rows])
        logits[case.name] = np.stack([given[row] for row in rows])
        with plain.using(BASE):
            alone = [plain.logits(own[row], chosen[row]) for row in rows]
        base_logits[case.name] = np.stack(alone)
    columns = _choose_columns(logits, seed)
    kept = [
        {case: one[..., columns] for case, one in every.items()} for every in (logits, base_logits)
    ]
    return DecoderReference(plain.source, columns, prompts, tokens, *kept)


def _choose_columns(logits: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    """All of a small vocabulary, else some by chance and the likeliest of every step."""
    every = np.concatenate([logit.reshape(-1, logit.shape[-1]) for logit in logits.values()])
    vocabulary = every.shape[1]
    if vocabulary <= _MOST_COLUMNS:
        return np.arange(vocabulary)
    likeliest = np.argpartition(-every, _TOP, axis=1)[:, :_TOP]
    chance = np.random.default_rng(seed).choice(vocabulary, _MOST_COLUMNS // 2, replace=False)
    return np.union1d(likeliest, chance)


def read_logits(model: Any, prompt: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """[STEPS, vocabulary]: what each of `tokens` was chosen from, in one pass without a cache."""
    ids = torch.tensor([[*prompt, *tokens[:-1].tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    found: np.ndarray = logits[0, len(prompt) - 1 :].numpy()
    return found


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
