"""A decoder's graph -> Report: logits and greedy tokens against a float64 model, and PEFT.

What is compared, and how: loraexport_runtime.checking.decoder.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraexport_runtime.checking.decoder import (
    compare_alone,
    compare_logits,
    compare_tokens,
    open_generators,
)
from loraexport_runtime.checking.decoder_cases import DecoderReference
from loraexport_runtime.checking.decoder_steps import Logits, open_runner
from loraexport_runtime.checking.model import BASE, Mix, slots_of
from loraexport_runtime.checking.rows import MODEL_TOLERANCES, Comparison, label_of
from loraexport_runtime.checking.ways import ways
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import normalise_providers
from loraexport_runtime.errors import ProviderError

from ...hf.model import load_stored_decoder
from ...hf.quiet import quiet_models
from ...spec.schema import Spec
from ..report import Report, make_report, tolerance_of
from .genai import GenaiEngine
from .reference import parts_read
from .streamed import Reading, StreamedDecoder

_MOST_TOKENS = 1024
"""Of a prompt that PEFT reads too: a longer one changes what the base does, not an adapter."""


def check_decoder(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    spec: Spec,
    reference: DecoderReference,
    plain: Path | str,
    providers: Sequence[str],
) -> Report:
    """Run every implementation on every case and compare.

    Args:
        plain: the Hugging Face model's directory, for PEFT, or why PEFT cannot be asked.
    """
    tolerance = tolerance_of(spec, MODEL_TOLERANCES, resolve(folder, decoder.onnx))
    skipped: dict[str, str] = {}
    rows: list[Comparison] = []
    for name, run in _peft(folder, manifest, plain, decoder.reread_length, skipped):
        rows += compare_logits(
            name, run, manifest, reference, tolerance, _MOST_TOKENS, blends=False
        )
    pairs = normalise_providers(providers) if providers else []
    for pair in pairs:
        for label, kernels in ways(manifest, pair, skipped):
            run = open_runner(folder, manifest, decoder, pair, kernels)
            rows += compare_logits(f"onnx-{label}", run, manifest, reference, tolerance)
            rows += compare_alone(f"onnx-{label}", run, manifest, reference, tolerance)
    for pair in pairs:
        for name, engine in open_generators(folder, manifest, decoder, pair, skipped):
            rows += compare_tokens(name, engine, manifest, reference, tolerance)
        for name, genai in _genai(folder, manifest, decoder, pair, skipped):
            # It has no input for the weights.
            rows += compare_tokens(name, genai, manifest, reference, tolerance, blends=False)
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx=True)


def _genai(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    pair: tuple[str, dict[str, Any]],
    skipped: dict[str, str],
) -> Iterator[tuple[str, GenaiEngine]]:
    """onnxruntime-genai's own engine over the same folder, as others may open it."""
    name = f"onnx-genai-{label_of(pair[0])}"
    try:
        yield name, GenaiEngine(folder, manifest, decoder, [pair])
    except ProviderError as error:
        skipped[name] = str(error)


def _peft(
    folder: Path,
    manifest: Manifest,
    plain: Path | str,
    reread_length: int | None,
    skipped: dict[str, str],
) -> Iterator[tuple[str, Logits]]:
    if isinstance(plain, str):
        skipped["peft"] = plain
    elif importlib.util.find_spec("peft") is None:
        skipped["peft"] = "peft is not installed"
    else:
        yield "peft", _peft_runner(folder, manifest, plain, reread_length)


def _peft_runner(
    folder: Path, manifest: Manifest, directory: Path, reread_length: int | None
) -> Logits:
    """transformers and PEFT in float32, each prompt and adapter alone."""
    from ..model.peft_model import put_adapters

    load = partial(load_stored_decoder, directory)
    base = load()
    peft = put_adapters(base, load, directory, folder, manifest)
    models = {slot: StreamedDecoder(model, {}, torch.float32) for slot, model in peft.alone.items()}
    mixed = StreamedDecoder(base, {}, torch.float32)

    def run(prompts: list[list[int]], tokens: np.ndarray, mixes: Sequence[Mix]) -> np.ndarray:
        adapter_ids = slots_of(mixes)
        logits: dict[int, list[np.ndarray]] = {row: [] for row in range(len(prompts))}
        for slot in dict.fromkeys(adapter_ids.tolist()):
            rows, readings = [], []
            for row in np.flatnonzero(adapter_ids == slot).tolist():
                for count, keep in parts_read(len(prompts[row]), reread_length):
                    read = [*prompts[row], *tokens[row, : count - 1].tolist()]
                    readings.append(Reading(BASE, read, keep))
                    rows.append(row)
            if slot in peft.names:
                peft.mixed.set_adapter(peft.names[slot])
            off = slot == 0 and peft.names
            with quiet_models(), peft.mixed.disable_adapter() if off else nullcontext():
                for row, values in zip(rows, models.get(slot, mixed).run(readings), strict=True):
                    logits[row].append(values)
        return np.stack([np.concatenate(parts) for parts in logits.values()])

    return run
