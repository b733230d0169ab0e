"""A decoder's graph -> Report: logits and greedy tokens against a float64 model, and PEFT.

What is compared, and how: loraexport_runtime.checking.decoder.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraexport_runtime.checking.decoder import (
    DecoderReference,
    compare_logits,
    compare_tokens,
    open_generators,
)
from loraexport_runtime.checking.decoder_steps import Logits, open_runner
from loraexport_runtime.checking.rows import MODEL_TOLERANCES, Row, label_of, slot_names
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import normalise_providers

from ...hf.model import load_plain_model
from ...hf.quiet import quiet_models
from ...spec.schema import Spec
from ..report import Report, make_report, tolerance_of
from .reference import read_logits


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
    tolerance = tolerance_of(spec, MODEL_TOLERANCES)
    skipped: dict[str, str] = {}
    rows: list[Row] = []
    for name, run in _peft(folder, manifest, plain, skipped):
        rows += compare_logits(name, run, manifest, reference, tolerance)
    pairs = normalise_providers(providers) if providers else []
    for pair in pairs:
        run = open_runner(folder, manifest, decoder, pair)
        name = f"onnx-{label_of(pair[0])}"
        rows += compare_logits(name, run, manifest, reference, tolerance)
    for pair in pairs:
        for name, engine in open_generators(folder, manifest, decoder, pair, skipped):
            rows += compare_tokens(name, engine, manifest, reference, tolerance)
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx=True)


def _peft(
    folder: Path, manifest: Manifest, plain: Path | str, skipped: dict[str, str]
) -> Iterator[tuple[str, Logits]]:
    if isinstance(plain, str):
        skipped["peft"] = plain
    elif importlib.util.find_spec("peft") is None:
        skipped["peft"] = "peft is not installed"
    else:
        yield "peft", _peft_runner(folder, manifest, plain)


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
