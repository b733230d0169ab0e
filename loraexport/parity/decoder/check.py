"""A decoder's graph -> Report: logits and greedy tokens against a float64 model, and PEFT.

Logits are compared at the prompt's last token and at the steps after it, fed with the reference's
tokens. Tokens are those of onnxruntime-genai, and on CUDA of the runtime's own engine too; where
one differs, the reference's logits of both must be as near as the tolerance allows, so that
rounding explains it.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.dlpack import from_dlpack

from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.manifest import Generator, Manifest
from loraexport_runtime.device.memory import host_value
from loraexport_runtime.device.providers import normalise_providers
from loraexport_runtime.errors import ProviderError
from loraexport_runtime.generation.generator import TextGenerator

from ...graphs.sessions import open_plain_onnx
from ...hf.model import load_plain_model
from ...hf.quiet import quiet_models
from ...spec.schema import Spec
from ...tensors import to_numpy
from ..model.cases import BASE, Mix, only
from ..report import (
    MODEL_TOLERANCES,
    Report,
    Row,
    Tolerance,
    compare,
    make_report,
    slot_names,
    tolerance_of,
)
from .cases import STEPS, empty_cache, make_cases, read_config
from .reference import DecoderReference, read_logits

Logits = Callable[[list[list[int]], np.ndarray, np.ndarray], np.ndarray]
"""(prompts, tokens to feed [batch, STEPS], adapter_ids) -> logits [batch, STEPS, vocabulary]."""


def check_decoder(
    folder: Path,
    manifest: Manifest,
    spec: Spec,
    reference: DecoderReference,
    plain: Path | str,
    providers: Sequence[str],
) -> Report:
    """Run every implementation on every case and compare.

    Args:
        plain: the Hugging Face model's directory, for PEFT, or why PEFT cannot be asked.
    """
    tolerance = tolerance_of(spec, MODEL_TOLERANCES)
    skipped: dict[str, str] = {}
    rows: list[Row] = []
    for name, run in _implementations(folder, manifest, plain, providers, skipped):
        rows += _compare_logits(name, run, manifest, reference, tolerance)
    for name, generator in _generators(folder, manifest, providers, skipped):
        rows += _compare_tokens(name, generator, manifest, reference, tolerance)
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx=True)


def _generators(
    folder: Path, manifest: Manifest, providers: Sequence[str], skipped: dict[str, str]
) -> Iterator[tuple[str, TextGenerator]]:
    """onnxruntime-genai on every provider, and on CUDA the runtime's engine with captured steps."""
    assert manifest.generator is not None, "the artifact is of a decoder"
    for provider in normalise_providers(providers):
        short = provider[0].removesuffix("ExecutionProvider").lower()
        yield f"onnx-genai-{short}", TextGenerator(folder, manifest, manifest.generator, [provider])
        if short == "cuda":
            try:
                captured = TextGenerator(folder, manifest, manifest.generator, [provider], True)
            except ProviderError as error:
                skipped["onnx-captured-cuda"] = str(error)
            else:
                yield "onnx-captured-cuda", captured


def _labels(manifest: Manifest) -> dict[Mix, str]:
    names: dict[Mix, str] = {BASE: "base"}
    return names | {only(slot): name for slot, name in sorted(slot_names(manifest).items())}


def _compare_logits(
    name: str, run: Logits, manifest: Manifest, reference: DecoderReference, tolerance: Tolerance
) -> list[Row]:
    labels = _labels(manifest)
    parts: dict[str, list[list[np.ndarray]]] = {who: [] for who in labels.values()}
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
            parts[labels[mix]].append([one[keep].reshape(-1, one.shape[-1]) for one in four])
    rows = []
    for who, pieces in parts.items():
        y, ref, y_base, ref_base = (np.concatenate(one) for one in zip(*pieces, strict=True))
        where = (name, "causal-lm", "logits", who)
        rows.append(compare(where, y, ref, y_base, ref_base, tolerance))
    return rows


def _compare_tokens(
    name: str,
    session: TextGenerator,
    manifest: Manifest,
    reference: DecoderReference,
    tolerance: Tolerance,
) -> list[Row]:
    """The share of prompts whose tokens differ; passed, if rounding explains each of them."""
    labels = _labels(manifest)
    names = slot_names(manifest)
    wrong: dict[str, list[float]] = {who: [] for who in labels.values()}
    margins: dict[str, list[float]] = {who: [0.0] for who in labels.values()}
    for case in make_cases(manifest):
        adapters = [names.get(slot) for slot in case.adapter_ids.tolist()]
        found = session.greedy(reference.prompts[case.name], adapters, STEPS)
        for row, mix in enumerate(case.rows):
            expected, logits = reference.tokens[case.name][row], reference.logits[case.name][row]
            over = np.flatnonzero(np.isin(expected, list(session.ends)))
            end = int(over[0]) + 1 if len(over) else STEPS  # what comes after it is padding
            differs = np.flatnonzero(found[row][:end] != expected[:end])
            wrong[labels[mix]].append(float(len(differs) > 0))
            if len(differs):
                pair = (expected[differs[0]], found[row][differs[0]])
                margins[labels[mix]].append(_gap(logits[differs[0]], reference.columns, *pair))
    return [
        Row(
            name,
            "causal-lm",
            "tokens",
            who,
            num_tokens=len(shares) * STEPS,
            max_abs_error=max(margins[who]),
            mean_abs_error=float(np.mean(shares)),
            error=max(margins[who]),
            cosine=None,
            gain=None,
            moved=None,
            passed=max(margins[who]) <= 2 * tolerance.error,
        )
        for who, shares in wrong.items()
    ]


def _gap(logits: np.ndarray, columns: np.ndarray, best: int, other: int) -> float:
    """How far the logit of `other` is from the best, of max |logits|; inf if it is not known."""
    at = {int(token): index for index, token in enumerate(columns)}
    if other not in at:
        return float("inf")
    return float((logits[at[best]] - logits[at[other]]) / np.abs(logits).max())


def _implementations(
    folder: Path,
    manifest: Manifest,
    plain: Path | str,
    providers: Sequence[str],
    skipped: dict[str, str],
) -> Iterator[tuple[str, Logits]]:
    generator = manifest.generator
    assert generator is not None, "the artifact is of a decoder"
    if isinstance(plain, str):
        skipped["peft"] = plain
    elif importlib.util.find_spec("peft") is None:
        skipped["peft"] = "peft is not installed"
    else:
        yield "peft", _peft_runner(folder, manifest, plain)
    for name in [one for one, _ in normalise_providers(providers)] if providers else []:
        short = name.removesuffix("ExecutionProvider").lower()
        yield f"onnx-{short}", _onnx_runner(folder, manifest, generator, name)


def _onnx_runner(folder: Path, manifest: Manifest, generator: Generator, provider: str) -> Logits:
    """The graph in a plain session: a batch padded on the right, then one token of each at a time.

    A row's cache has no gap: its own length says where the next token's key and value go.
    """
    path = resolve(folder, generator.onnx)
    session = open_plain_onnx(path, provider)
    taken = [one.name for one in session.get_inputs()]
    past = [name for name in taken if name.startswith("past_key_values.")]
    outputs = [one.name for one in session.get_outputs()]
    config = read_config(folder, manifest)

    def run(prompts: list[list[int]], tokens: np.ndarray, adapter_ids: np.ndarray) -> np.ndarray:
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.full((len(prompts), lengths.max()), generator.pad_token_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        empty = empty_cache(config, len(prompts), manifest.dtype)
        cache = {name: host_value(empty, manifest.dtype) for name in past}
        total, steps = ids.shape[1], []
        for step in range(tokens.shape[1]):
            mask = (np.arange(total + step) < (lengths + step)[:, None]).astype(np.int64)
            feeds = {"input_ids": ids, "attention_mask": mask, "adapter_ids": adapter_ids}
            if "position_ids" in taken:
                first = 0 if step == 0 else lengths[:, None] + step - 1
                feeds["position_ids"] = first + np.arange(ids.shape[1]) + np.zeros_like(ids)
            # As OrtValues: numpy has no bfloat16 that onnxruntime takes.
            taken_now = {name: host_value(array, "int64") for name, array in feeds.items()}
            given = session.run_with_ort_values(outputs, {**taken_now, **cache})
            values = dict(zip(outputs, given, strict=True))
            last = lengths - 1 if step == 0 else np.zeros_like(lengths)
            logits = to_numpy(from_dlpack(values["logits"]))
            steps.append(logits[np.arange(len(prompts)), last])
            for name in past:
                cache[name] = values[name.replace("past_key_values.", "present.")]
            ids = np.ascontiguousarray(tokens[:, step : step + 1])
        return np.stack(steps, axis=1)

    return run


def _peft_runner(folder: Path, manifest: Manifest, directory: Path) -> Logits:
    """transformers and PEFT in float32, each prompt and adapter alone."""
    from ..model.peft_model import add_adapter

    base = load_plain_model(directory, "causal-lm", {})
    wrapped: Any = None
    for entry in manifest.adapters:
        if entry.slot is not None:
            wrapped = add_adapter(wrapped, base, resolve(folder, entry.path), entry)
    names = slot_names(manifest)
    model = wrapped.eval()

    def run(prompts: list[list[int]], tokens: np.ndarray, adapter_ids: np.ndarray) -> np.ndarray:
        found = []
        for slot, prompt, own in zip(adapter_ids.tolist(), prompts, tokens, strict=True):
            with quiet_models():
                if slot:
                    model.set_adapter(names[slot])
                    found.append(read_logits(model, prompt, own))
                else:
                    with model.disable_adapter():
                        found.append(read_logits(model, prompt, own))
        return np.stack(found)

    return run
