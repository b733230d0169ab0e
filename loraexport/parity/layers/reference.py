"""Inputs and expected outputs of layers, by the float64 oracle; kept in the artifact."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from loraexport_runtime.checking.layers import Reference, make_cases
from loraexport_runtime.checking.rows import slot_names
from loraexport_runtime.checking.stored import CASES_FILE
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.manifest import Manifest

from ...bases.weights import Base
from ...spec.schema import Spec
from ..oracle import read_reference_adapter, reference_output
from .cases import make_input


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
    return Reference("the float64 oracle", cases, inputs, expected)


def save_reference(reference: Reference, folder: Path) -> None:
    """Keep inputs and expected outputs (as float32) in the artifact."""
    arrays = {f"{layer}/x": x for layer, x in reference.inputs.items()}
    for (layer, case), y in reference.expected.items():
        arrays[f"{layer}/y/{case}"] = y.astype(np.float32)
    (folder / CASES_FILE).parent.mkdir(exist_ok=True)
    (folder / CASES_FILE).write_bytes(save(arrays))  # save_file would make it mode 600
