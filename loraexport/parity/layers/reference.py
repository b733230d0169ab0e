"""Inputs and expected outputs of layers, by the float64 oracle or as a build kept them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.manifest import Manifest

from ...bases.weights import Base
from ...spec.schema import Spec
from ..oracle import read_reference_adapter, reference_output
from ..report import CASES_FILE, slot_names
from .cases import make_cases, make_input


@dataclass(frozen=True)
class Reference:
    """Inputs and expected outputs of every layer."""

    source: str
    inputs: dict[str, np.ndarray]
    """By layer: x [T, in] or ids [T]."""
    expected: dict[tuple[str, str], np.ndarray]
    """By (layer, case): y [tokens of the case, out]; by (layer, ""): y [T, out] of slot 0."""


def make_reference(folder: Path, manifest: Manifest, spec: Spec, base: Base) -> Reference:
    """Compute inputs and expected outputs with the oracle, from the artifact's own adapters."""
    cases = make_cases(slot_names(manifest), spec.parity.tokens)
    sites = [part.site for layer in manifest.layers for part in layer.slices]
    adapters = {
        entry.slot: read_reference_adapter(resolve(folder, entry.path), sites, entry.scale)
        for entry in manifest.adapters
        if entry.slot is not None
    }
    inputs, expected = {}, {}
    for layer in manifest.layers:
        x = make_input(layer, cases, spec.export.dtype, spec.parity.seed)
        weights = [
            (part.site, base.sites[part.site].weight, base.sites[part.site].bias)
            for part in layer.slices
        ]
        inputs[layer.name] = x
        expected[layer.name, ""] = reference_output(x, np.zeros(len(x), np.int64), weights, {})
        for case in cases:
            x_case = x[: case.num_tokens]
            y = reference_output(x_case, case.token_slots, weights, adapters)
            expected[layer.name, case.name] = y
    return Reference("the float64 oracle", inputs, expected)


def save_reference(reference: Reference, folder: Path) -> None:
    """Keep inputs and expected outputs (as float32) in the artifact."""
    arrays = {f"{layer}/x": x for layer, x in reference.inputs.items()}
    for (layer, case), y in reference.expected.items():
        arrays[f"{layer}/y/{case}"] = y.astype(np.float32)
    (folder / CASES_FILE).parent.mkdir(exist_ok=True)
    (folder / CASES_FILE).write_bytes(save(arrays))  # save_file would make it mode 600


def load_reference(folder: Path) -> Reference:
    """The reference that a build kept: float32, so good to about 1e-7."""
    inputs, expected = {}, {}
    for name, array in load_file(resolve(folder, CASES_FILE)).items():
        layer, kind, *case = name.split("/", 2)
        if kind == "x":
            inputs[layer] = array
        else:
            expected[layer, case[0]] = array
    return Reference("the stored cases", inputs, expected)
