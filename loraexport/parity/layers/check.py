"""Graphs of an artifact folder -> Report: every implementation against the float64 oracle.

`check` does the work, for a build (on its staging folder) and for `loraexport verify` alike. The
ONNX graphs run through loraexport_runtime, the code that services use.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from loraexport_runtime import LayersSession
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.manifest import Layer, Manifest
from loraexport_runtime.device.providers import CPU, normalise_providers

from ...bases.layers import LayerModules
from ...graphs.sessions import open_plain_onnx
from ...spec.schema import Spec
from ...tensors import to_numpy, to_torch
from ..implementations import open_torchscript, torch_devices
from ..report import (
    LAYER_TOLERANCES,
    Report,
    Row,
    Tolerance,
    compare,
    make_report,
    slot_names,
    tolerance_of,
)
from .cases import Case, make_cases
from .reference import Reference

Run = Callable[[Layer, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(layer, x, seg_indptr, seg_slots) -> y."""


def check(
    folder: Path,
    manifest: Manifest,
    spec: Spec,
    reference: Reference,
    modules: Sequence[LayerModules],
    providers: Sequence[str],
) -> Report:
    """Run every implementation on every case and compare.

    Args:
        modules: the eager modules; empty where the base is not at hand.
        providers: onnxruntime's names; torch's graphs follow to the same devices.
    """
    cases = make_cases(slot_names(manifest), spec.parity.tokens)
    tolerance = tolerance_of(spec, LAYER_TOLERANCES)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for name, run in _implementations(folder, manifest, modules, providers, skipped):
        for layer in manifest.layers:
            rows += _check_layer(
                name, run, layer, cases, reference, slot_names(manifest), tolerance
            )
    has_onnx = any(layer.onnx for layer in manifest.layers)
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx)


def _implementations(
    folder: Path,
    manifest: Manifest,
    modules: Sequence[LayerModules],
    providers: Sequence[str],
    skipped: dict[str, str],
) -> Iterator[tuple[str, Run]]:
    by_name = {one.layer.name: one for one in modules}
    names = [name for name, _ in normalise_providers(providers)] if providers else []
    if modules:
        yield "eager", lambda layer, *inputs: _run_stacked(by_name[layer.name], *inputs)
        yield (
            "eager-segmented",
            lambda layer, *inputs: _run_torch(by_name[layer.name].segmented, "cpu", *inputs),
        )
    else:
        skipped["eager"] = "the base is not here"
    if all(layer.torchscript for layer in manifest.layers):
        for device in torch_devices(names):
            yield f"torchscript-{device}", _torchscript_runner(folder, manifest, device)
    else:
        skipped["torchscript"] = "the spec does not ask for it"
    if not all(layer.onnx for layer in manifest.layers):
        skipped["onnx"] = "the spec does not ask for it"
        return
    if not names:
        skipped["onnx"] = f"{manifest.needs_cuda}, and no CUDA is here"
    for name in names:
        short = name.removesuffix("ExecutionProvider").lower()
        session = LayersSession(folder, manifest, normalise_providers([name]), None)
        yield f"onnx-{short}", _session_runner(session)
        if name == CPU:
            yield "onnx-cpu-plain", _plain_runner(folder, manifest)


def _check_layer(
    implementation: str,
    run: Run,
    layer: Layer,
    cases: Sequence[Case],
    reference: Reference,
    names: Mapping[int, str],
    tolerance: Tolerance,
) -> list[Row]:
    x = reference.inputs[layer.name]
    base_output = run(layer, x, np.array([0, len(x)]), np.array([0]))
    base_expected = reference.expected[layer.name, ""]
    outputs = [run(layer, x[: case.num_tokens], case.seg_indptr, case.seg_slots) for case in cases]
    rows = []
    for slot in (0, *sorted(names)):
        tokens = [np.flatnonzero(case.token_slots == slot) for case in cases]
        for part in layer.slices:
            columns = slice(part.offset, part.offset + part.width)

            def pick(
                arrays: Sequence[np.ndarray],
                tokens: list[np.ndarray] = tokens,
                columns: slice = columns,
            ) -> np.ndarray:
                picked = [one[rows][:, columns] for one, rows in zip(arrays, tokens, strict=True)]
                return np.concatenate(picked)

            rows.append(
                compare(
                    (implementation, layer.name, part.site, names.get(slot, "base")),
                    pick(outputs),
                    pick([reference.expected[layer.name, case.name] for case in cases]),
                    pick([base_output] * len(cases)),
                    pick([base_expected] * len(cases)),
                    tolerance,
                )
            )
    return rows


def _run_torch(module: torch.nn.Module, device: str, *inputs: np.ndarray) -> np.ndarray:
    """x goes to the device, the segments stay on the CPU."""
    x, seg_indptr, seg_slots = map(to_torch, inputs)
    with torch.no_grad():
        return to_numpy(module(x.to(device), seg_indptr, seg_slots))


def _run_stacked(modules: LayerModules, *inputs: np.ndarray) -> np.ndarray:
    stacks = [to_torch(modules.stacks[stack.name]) for stack in modules.layer.stacks]
    with torch.no_grad():
        return to_numpy(modules.stacked(*map(to_torch, inputs), *stacks))


def _torchscript_runner(folder: Path, manifest: Manifest, device: str) -> Run:
    graphs = {
        layer.name: open_torchscript(resolve(folder, str(layer.torchscript)), device)
        for layer in manifest.layers
    }
    return lambda layer, *inputs: _run_torch(graphs[layer.name], device, *inputs)


def _session_runner(session: LayersSession) -> Run:
    return lambda layer, x, seg_indptr, seg_slots: session[layer.name].run(
        x, seg_indptr=seg_indptr, seg_slots=seg_slots
    )


def _plain_runner(folder: Path, manifest: Manifest) -> Run:
    graphs = {
        layer.name: open_plain_onnx(resolve(folder, str(layer.onnx))) for layer in manifest.layers
    }

    def run(
        layer: Layer, x: np.ndarray, seg_indptr: np.ndarray, seg_slots: np.ndarray
    ) -> np.ndarray:
        feeds = {layer.input_name: x, "seg_indptr": seg_indptr, "seg_slots": seg_slots}
        y: np.ndarray = graphs[layer.name].run(None, feeds)[0]
        return y

    return run
