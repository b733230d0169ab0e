"""Cases of a decoder: prompts and their adapters, and the tokens and logits they should give.

Logits are compared at the prompt's last token and at the steps after it, fed with the reference's
tokens. Tokens are those of the runtime's engines; where one differs, the reference's logits of
both must be as near as the tolerance allows, so that rounding explains it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..contract.kinds import Decoder
from ..contract.manifest import Manifest
from ..errors import ProviderError
from ..generation.generator import TextGenerator
from .decoder_steps import Logits, open_runner
from .model import BASE, Mix, mix_labels, only
from .rows import (
    MODEL_TOLERANCES,
    CasePart,
    Row,
    Tolerance,
    compare,
    label_of,
    slot_names,
    stored_tolerance,
)
from .stored import SOURCE, read_stored

STEPS = 8


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
    """Every adapter alone, all mixed with the base, base only, one prompt.

    Published artifacts hold what these rows give without the rows themselves: a change here needs
    another format.
    """
    names = slot_names(manifest)
    slots = sorted(names)
    mixed = (*map(only, slots), BASE, only(slots[0]))
    return (
        *(PromptCase(f"alone-{names[slot]}", (only(slot),) * 2, (5, 9)) for slot in slots),
        PromptCase("mixed", mixed, tuple(4 + 3 * (index % 4) for index in range(len(mixed)))),
        PromptCase("base-only", (BASE, BASE), (3, 8)),
        PromptCase("one-prompt", (only(slots[-1]),), (6,)),
    )


def load_reference(folder: Path, manifest: Manifest) -> DecoderReference:
    """The reference that a build kept.

    Raises:
        ArtifactError: it is missing, damaged, or not of this manifest.
    """
    stored = read_stored(folder, manifest)
    columns = stored.read("columns", None)
    prompts, tokens, logits, base_logits = {}, {}, {}, {}
    for case in make_cases(manifest):
        shape = len(case.rows), STEPS
        prompts[case.name] = [
            stored.read(f"{case.name}/x/{row}", length).tolist()
            for row, length in enumerate(case.lengths)
        ]
        tokens[case.name] = stored.read(f"{case.name}/tokens", *shape)
        logits[case.name] = stored.read(f"{case.name}/y", *shape, len(columns))
        base_logits[case.name] = stored.read(f"{case.name}/base", *shape, len(columns))
    return DecoderReference(SOURCE, columns, prompts, tokens, logits, base_logits)


def check_stored(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    providers: Sequence[tuple[str, dict[str, Any]]],
    skipped: dict[str, str],
) -> list[Row]:
    """Run the stored cases on every provider: the graph's logits, and the engines' tokens.

    Args:
        skipped: takes up what cannot run here, and why.

    Raises:
        ArtifactError: there are none, or they are damaged.
        ProviderError: a provider cannot run here, or onnxruntime-genai is not installed.
    """
    reference = load_reference(folder, manifest)
    tolerance = stored_tolerance(manifest, MODEL_TOLERANCES)
    rows: list[Row] = []
    for provider in providers:
        for engine, session in open_generators(folder, manifest, decoder, provider, skipped):
            rows += compare_tokens(engine, session, manifest, reference, tolerance)
        run, name = open_runner(folder, manifest, decoder, provider), label_of(provider[0])
        rows += compare_logits(f"onnx-{name}", run, manifest, reference, tolerance)
    return rows


def open_generators(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    provider: tuple[str, dict[str, Any]],
    skipped: dict[str, str],
) -> Iterator[tuple[str, TextGenerator]]:
    """onnxruntime-genai, and on CUDA the runtime's engine with captured steps."""
    device = label_of(provider[0])
    yield f"onnx-genai-{device}", TextGenerator(folder, manifest, decoder, [provider])
    if device == "cuda":
        try:
            captured = TextGenerator(folder, manifest, decoder, [provider], cuda_graphs=True)
        except ProviderError as error:
            skipped["onnx-captured-cuda"] = str(error)
        else:
            yield "onnx-captured-cuda", captured


def compare_logits(
    implementation: str,
    run: Logits,
    manifest: Manifest,
    reference: DecoderReference,
    tolerance: Tolerance,
) -> list[Row]:
    """Run every case; a row for each adapter."""
    labels = mix_labels(manifest)
    pieces: dict[str, list[CasePart]] = {who: [] for who in labels.values()}
    for case in make_cases(manifest):
        prompts, tokens = reference.prompts[case.name], reference.tokens[case.name]
        four = (
            run(prompts, tokens, case.adapter_ids)[..., reference.columns],
            reference.logits[case.name],
            run(prompts, tokens, np.zeros_like(case.adapter_ids))[..., reference.columns],
            reference.base_logits[case.name],
        )
        for mix in set(case.rows):
            keep = np.array([row == mix for row in case.rows])
            piece = CasePart(case.name, *(part[keep].reshape(-1, part.shape[-1]) for part in four))
            pieces[labels[mix]].append(piece)
    return [
        compare((implementation, "causal-lm", "logits", who), parts, tolerance)
        for who, parts in pieces.items()
    ]


def compare_tokens(
    implementation: str,
    session: TextGenerator,
    manifest: Manifest,
    reference: DecoderReference,
    tolerance: Tolerance,
) -> list[Row]:
    """Run every case greedily; a row for each adapter.

    Its mean error is the share of prompts whose tokens differ; it passed if rounding explains
    each of them.
    """
    labels, names = mix_labels(manifest), slot_names(manifest)
    gaps: dict[str, list[tuple[float, str]]] = {who: [] for who in labels.values()}
    wrong: dict[str, list[bool]] = {who: [] for who in labels.values()}
    for case in make_cases(manifest):
        adapters = [names.get(slot) for slot in case.adapter_ids.tolist()]
        chosen = session.greedy(reference.prompts[case.name], adapters, STEPS)
        for row, mix in enumerate(case.rows):
            expected, logits = reference.tokens[case.name][row], reference.logits[case.name][row]
            over = np.flatnonzero(np.isin(expected, list(session.ends)))
            end = int(over[0]) + 1 if len(over) else STEPS  # what comes after it is padding
            differs = np.flatnonzero(chosen[row][:end] != expected[:end])
            wrong[labels[mix]].append(len(differs) > 0)
            gap = 0.0
            if len(differs):
                pair = (expected[differs[0]], chosen[row][differs[0]])
                gap = _gap(logits[differs[0]], reference.columns, *pair)
            gaps[labels[mix]].append((gap, case.name))
    rows = []
    for who, every in gaps.items():
        largest, case_name = max(every, key=lambda pair: pair[0])
        rows.append(
            Row(
                implementation,
                "causal-lm",
                "tokens",
                who,
                num_tokens=len(every) * STEPS,
                max_abs_error=largest,
                mean_abs_error=float(np.mean(wrong[who])),
                error=largest,
                cosine=None,
                gain=None,
                moved=None,
                worst_case=case_name,
                passed=largest <= 2 * tolerance.error,
            )
        )
    return rows


def _gap(logits: np.ndarray, columns: np.ndarray, best: int, other: int) -> float:
    """How far the logit of `other` is from the best, of max |logits|; inf if it is not known."""
    at = {int(token): index for index, token in enumerate(columns)}
    if other not in at:
        return float("inf")
    return float((logits[at[best]] - logits[at[other]]) / np.abs(logits).max())
