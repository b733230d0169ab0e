"""A decoder held to its cases: the logits of its graph, and the tokens of engines.

Logits are compared at the prompt's last token and at the steps after it, fed with the reference's
tokens; and rows of a mixed batch with each of them alone. Where a token differs, the reference's
logits of both must be as near as the tolerance allows, so that rounding explains it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..contract.kinds import Decoder
from ..contract.manifest import Manifest
from ..errors import ProviderError
from ..generation.generator import TextGenerator
from ..slots.batch import RowAdapters
from .decoder_cases import STEPS, DecoderReference, load_reference, make_cases
from .decoder_steps import Logits, open_runner
from .model import BASE, mix_labels, row_names
from .rows import (
    MODEL_TOLERANCES,
    CasePart,
    Comparison,
    Tolerance,
    compare,
    label_of,
    slot_names,
    stored_tolerance,
)
from .ways import ways

ROWS_ALONE = "rows alone"
"""The site of a report's row that holds mixed batches to their rows alone."""
BLEND = "blend"
"""The adapter of a report's row that holds all rows that blend."""


def check_stored(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    providers: Sequence[tuple[str, dict[str, Any]]],
    skipped: dict[str, str],
) -> list[Comparison]:
    """Run the stored cases on every provider: the graph's logits, and the engines' tokens.

    Args:
        skipped: takes up what cannot run here, and why.

    Raises:
        ArtifactError: there are none, or they are damaged.
        ProviderError: a provider cannot run here, or onnxruntime-genai is not installed.
    """
    reference = load_reference(folder, manifest)
    tolerance = stored_tolerance(manifest, MODEL_TOLERANCES)
    rows: list[Comparison] = []
    for provider in providers:
        for engine, session in open_generators(folder, manifest, decoder, provider, skipped):
            rows += compare_tokens(engine, session, manifest, reference, tolerance)
        for label, kernels in ways(manifest, provider, skipped):
            run = open_runner(folder, manifest, decoder, provider, kernels)
            rows += compare_logits(f"onnx-{label}", run, manifest, reference, tolerance)
            rows += compare_alone(f"onnx-{label}", run, manifest, reference, tolerance)
    return rows


class GreedyEngine(Protocol):
    """What gives the likeliest tokens of a batch."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""

    def greedy(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapters], steps: int
    ) -> np.ndarray:
        """int64 [batch, steps]; what follows a row's end is not looked at."""


def open_generators(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    provider: tuple[str, dict[str, Any]],
    skipped: dict[str, str],
) -> Iterator[tuple[str, TextGenerator]]:
    """The runtime's engine, and on CUDA the same with captured steps; with kernels too."""
    device = label_of(provider[0])
    engines = {}
    for label, kernels in ways(manifest, provider, skipped):
        engines[f"onnx-engine-{label}"] = False, kernels
        if device == "cuda":
            engines[f"onnx-captured-{label}"] = True, kernels
    for name, (captures, kernels) in engines.items():
        try:
            generator = TextGenerator(
                folder, manifest, decoder, [provider], cuda_graphs=captures, kernels=kernels
            )
        except ProviderError as error:
            if device == "cpu":
                raise
            skipped[name] = str(error)
        else:
            with generator:
                yield name, generator


def compare_logits(
    implementation: str,
    run: Logits,
    manifest: Manifest,
    reference: DecoderReference,
    tolerance: Tolerance,
    most_tokens: int | None = None,
    blends: bool = True,
) -> list[Comparison]:
    """Run every case; a row for each adapter, and one for all blends.

    Args:
        most_tokens: cases with a longer prompt are left out.
        blends: False leaves rows that blend out, for an implementation with other rules.
    """
    labels = mix_labels(manifest)
    pieces: dict[str, list[CasePart]] = {who: [] for who in (*labels.values(), BLEND)}
    for case in make_cases(manifest):
        if most_tokens is not None and max(case.lengths) > most_tokens:
            continue
        if not blends and not labels.keys() >= {*case.rows}:
            continue
        prompts, tokens = reference.prompts[case.name], reference.tokens[case.name]
        four = (
            run(prompts, tokens, case.rows)[..., reference.columns],
            reference.logits[case.name],
            run(prompts, tokens, (BASE,) * len(case.rows))[..., reference.columns],
            reference.base_logits[case.name],
        )
        for mix in set(case.rows):
            keep = np.array([row == mix for row in case.rows])
            piece = CasePart(case.name, *(part[keep].reshape(-1, part.shape[-1]) for part in four))
            pieces[labels.get(mix, BLEND)].append(piece)
    return [
        compare((implementation, "causal-lm", "logits", who), parts, tolerance)
        for who, parts in pieces.items()
        if parts
    ]


def compare_alone(
    implementation: str,
    run: Logits,
    manifest: Manifest,
    reference: DecoderReference,
    tolerance: Tolerance,
) -> list[Comparison]:
    """Hold every row of a mixed batch to the same row alone; one row for each adapter."""
    labels = mix_labels(manifest)
    pieces: dict[str, list[CasePart]] = {}
    for case in make_cases(manifest):
        if len(set(case.rows)) == 1:
            continue
        prompts, tokens = reference.prompts[case.name], reference.tokens[case.name]
        batch = run(prompts, tokens, case.rows)[..., reference.columns]
        for index, mix in enumerate(case.rows):
            row = slice(index, index + 1)
            single = run(prompts[row], tokens[row], case.rows[row])[0, :, reference.columns]
            alone = single.T.astype(np.float64)
            part = CasePart(case.name, batch[index], alone, batch[index], alone)
            pieces.setdefault(labels.get(mix, BLEND), []).append(part)
    return [
        compare((implementation, "causal-lm", ROWS_ALONE, who), parts, tolerance)
        for who, parts in pieces.items()
    ]


def compare_tokens(
    implementation: str,
    session: GreedyEngine,
    manifest: Manifest,
    reference: DecoderReference,
    tolerance: Tolerance,
    blends: bool = True,
) -> list[Comparison]:
    """Run every case greedily; a row for each adapter, and one for all blends.

    Its mean error is the share of prompts whose tokens differ; it passed if rounding explains
    each of them.

    Args:
        blends: see `compare_logits`.
    """
    labels, names = mix_labels(manifest), slot_names(manifest)
    gaps: dict[str, list[tuple[float, str]]] = {who: [] for who in (*labels.values(), BLEND)}
    wrong: dict[str, list[bool]] = {who: [] for who in gaps}
    for case in make_cases(manifest):
        if not blends and not labels.keys() >= {*case.rows}:
            continue
        adapters = [row_names(row, names) for row in case.rows]
        chosen = session.greedy(reference.prompts[case.name], adapters, STEPS)
        for row, mix in enumerate(case.rows):
            expected, logits = reference.tokens[case.name][row], reference.logits[case.name][row]
            over = np.flatnonzero(np.isin(expected, list(session.ends)))
            end = int(over[0]) + 1 if len(over) else STEPS  # what comes after it is padding
            differs = np.flatnonzero(chosen[row][:end] != expected[:end])
            who = labels.get(mix, BLEND)
            wrong[who].append(len(differs) > 0)
            gap = 0.0
            if len(differs):
                pair = (expected[differs[0]], chosen[row][differs[0]])
                gap = _gap(logits[differs[0]], reference.columns, *pair)
            gaps[who].append((gap, case.name))
    rows = []
    for who, every in gaps.items():
        if not every:
            continue
        largest, case_name = max(every, key=lambda pair: pair[0])
        rows.append(
            Comparison(
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
                broke=() if largest <= 2 * tolerance.error else ("tokens",),
            )
        )
    return rows


def _gap(logits: np.ndarray, columns: np.ndarray, best: int, chosen: int) -> float:
    """How far the logit of `chosen` is from the best, of max |logits|; inf if it is not known."""
    at = {int(token): index for index, token in enumerate(columns)}
    if chosen not in at:
        return float("inf")
    return float((logits[at[best]] - logits[at[chosen]]) / np.abs(logits).max())
