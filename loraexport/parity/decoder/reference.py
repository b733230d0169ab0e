"""What a decoder should give: its logits and greedy tokens, every prompt alone, without padding."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save

from loraexport_runtime.contract.genai_config import end_tokens, read_genai_config
from loraexport_runtime.contract.manifest import Manifest, resolve
from loraexport_runtime.device.providers import NUMPY_DTYPES

from ..implementations import CASES_FILE, slot_names
from ..model.reference import BASE, Mix, only

STEPS = 8
_MOST_COLUMNS = 8192
_TOP = 16


@dataclass(frozen=True)
class PromptCase:
    """A batch: what each prompt uses, and the prompts, of different lengths."""

    name: str
    rows: tuple[Mix, ...]
    lengths: tuple[int, ...]

    @property
    def adapter_ids(self) -> np.ndarray:
        """int64 [batch]"""
        return np.array([row[0][0] if row else 0 for row in self.rows], dtype=np.int64)


@dataclass(frozen=True)
class DecoderReference:
    """By case: the prompts, and for each row its tokens [STEPS] and logits [STEPS, columns]."""

    source: str
    columns: np.ndarray
    """int64: tokens whose logits are compared; of a large vocabulary some, the likeliest too."""
    prompts: dict[str, list[list[int]]]
    tokens: dict[str, np.ndarray]
    """int64 [batch, STEPS]"""
    logits: dict[str, np.ndarray]
    """[batch, STEPS, columns]: step s is what token s is the likeliest of."""
    base_logits: dict[str, np.ndarray]
    """What the base alone gives for the same tokens, [batch, STEPS, columns]."""


def make_cases(manifest: Manifest) -> tuple[PromptCase, ...]:
    """Every adapter alone, all mixed with the base, base only, one prompt."""
    names = slot_names(manifest)
    slots = sorted(names)
    mixed = (*map(only, slots), BASE, only(slots[0]))
    return (
        *(PromptCase(f"alone-{names[slot]}", (only(slot),) * 2, (5, 9)) for slot in slots),
        PromptCase("mixed", mixed, tuple(4 + 3 * (index % 4) for index in range(len(mixed)))),
        PromptCase("base-only", (BASE, BASE), (3, 8)),
        PromptCase("one-prompt", (only(slots[-1]),), (6,)),
    )


def make_prompts(
    case: PromptCase, vocabulary: int, avoid: Sequence[int], seed: int
) -> list[list[int]]:
    """Random tokens other than those that pad or end a text."""
    generator = np.random.default_rng([seed, *case.lengths])
    allowed = np.setdiff1d(np.arange(vocabulary), avoid)
    return [generator.choice(allowed, length).tolist() for length in case.lengths]


class Decoder(Protocol):
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
    folder: Path, decoder: Decoder, manifest: Manifest, seed: int
) -> DecoderReference:
    """Run a decoder on every prompt of every case."""
    config = read_config(folder, manifest)
    special = [*end_tokens(config), config["pad_token_id"], config.get("bos_token_id")]
    avoid = [token for token in special if isinstance(token, int)]
    prompts, tokens, logits, base_logits = {}, {}, {}, {}
    for case in make_cases(manifest):
        own = make_prompts(case, config["vocab_size"], avoid, seed)
        chosen: dict[int, np.ndarray] = {}
        given: dict[int, np.ndarray] = {}
        for mix in set(case.rows):
            with decoder.using(mix):
                for row, prompt in enumerate(own):
                    if case.rows[row] == mix:
                        chosen[row] = decoder.greedy(prompt)
                        given[row] = decoder.logits(prompt, chosen[row])
        rows = range(len(own))
        prompts[case.name] = own
        tokens[case.name] = np.stack([chosen[row] for row in rows])
        logits[case.name] = np.stack([given[row] for row in rows])
        with decoder.using(BASE):
            plain = [decoder.logits(own[row], chosen[row]) for row in rows]
        base_logits[case.name] = np.stack(plain)
    columns = _choose_columns(logits, seed)
    kept = [
        {case: one[..., columns] for case, one in every.items()} for every in (logits, base_logits)
    ]
    return DecoderReference(decoder.source, columns, prompts, tokens, *kept)


def read_config(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What onnxruntime-genai is told of the model."""
    assert manifest.generator is not None, "the manifest is of a decoder"
    config: dict[str, Any] = read_genai_config(resolve(folder, manifest.generator.folder))["model"]
    return config


def empty_cache(config: Mapping[str, Any], batch: int, dtype: str) -> np.ndarray:
    """A layer's keys, or values, of no tokens: [batch, heads, 0, size]."""
    decoder = config["decoder"]
    sizes = (batch, decoder["num_key_value_heads"], 0, decoder["head_size"])
    return np.zeros(sizes, NUMPY_DTYPES[dtype])


def _choose_columns(logits: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    """All of a small vocabulary, else some by chance and the likeliest of every step."""
    every = np.concatenate([one.reshape(-1, one.shape[-1]) for one in logits.values()])
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


def load_reference(folder: Path) -> DecoderReference:
    """The reference that a build kept."""
    arrays = load_file(resolve(folder, CASES_FILE))
    columns = arrays.pop("columns")
    names = dict.fromkeys(name.split("/")[0] for name in arrays)
    prompts = {
        case: [arrays[f"{case}/x/{row}"].tolist() for row in range(len(arrays[f"{case}/tokens"]))]
        for case in names
    }
    return DecoderReference(
        "the stored cases",
        columns,
        prompts,
        {case: arrays[f"{case}/tokens"] for case in names},
        {case: arrays[f"{case}/y"] for case in names},
        {case: arrays[f"{case}/base"] for case in names},
    )
