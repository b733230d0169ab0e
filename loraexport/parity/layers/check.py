"""Graphs of an artifact folder -> Report: every implementation against the float64 oracle.

`check` does the work, for a build (on its staging folder) and for `loraexport verify` alike. The
ONNX graphs run through loraexport_runtime, the code that services use.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from loraexport_runtime.checking.layers import (
    Case,
    Reference,
    Run,
    compare_layers,
    open_runner,
)
from loraexport_runtime.checking.rows import LAYER_TOLERANCES, Comparison
from loraexport_runtime.checking.ways import ways
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.manifest import Layer, Manifest
from loraexport_runtime.device.providers import CPU, normalise_providers

from ...bases.layers import LayerModules
from ...graphs.sessions import open_plain_onnx
from ...spec.schema import Spec
from ...tensors import to_numpy, to_torch
from ..implementations import NO_TORCHSCRIPT, NOT_ASKED, open_torchscript, torch_devices
from ..report import Report, make_report, tolerance_of


def check(
    folder: Path,
    manifest: Manifest,
    spec: Spec,
    reference: Reference,
    modules: Sequence[LayerModules],
    providers: Sequence[str],
    torchscript: bool,
) -> Report:
    """Run every implementation on every case and compare.

    Args:
        modules: the eager modules; empty where the base is not at hand.
        providers: onnxruntime's names; torch's graphs follow to the same devices.
        torchscript: whether to run what torch.jit loads, which may be any code.
    """
    tolerance = tolerance_of(spec, LAYER_TOLERANCES)
    rows: list[Comparison] = []
    skipped: dict[str, str] = {}
    for name, run in _implementations(folder, manifest, modules, providers, torchscript, skipped):
        rows += compare_layers(name, run, manifest, reference, tolerance)
    has_onnx = any(layer.onnx for layer in manifest.layers)
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx)


def _implementations(
    folder: Path,
    manifest: Manifest,
    modules: Sequence[LayerModules],
    providers: Sequence[str],
    torchscript: bool,
    skipped: dict[str, str],
) -> Iterator[tuple[str, Run]]:
    by_name = {module.layer.name: module for module in modules}
    pairs = normalise_providers(providers) if providers else []
    if modules:
        yield "eager", lambda layer, x, case: _run_stacked(by_name[layer.name], x, case)
        yield (
            "eager-segmented",
            lambda layer, x, case: _run_torch(by_name[layer.name].segmented, "cpu", x, case),
        )
    else:
        skipped["eager"] = "the base is not here"
    has_torchscript = all(layer.torchscript for layer in manifest.layers)
    if has_torchscript and torchscript:
        for device in torch_devices([name for name, _ in pairs]):
            yield f"torchscript-{device}", _torchscript_runner(folder, manifest, device)
    else:
        skipped["torchscript"] = NO_TORCHSCRIPT if has_torchscript else NOT_ASKED
    if not all(layer.onnx for layer in manifest.layers):
        skipped["onnx"] = NOT_ASKED
        return
    if not pairs:
        skipped["onnx"] = f"{manifest.needs_cuda}, and no CUDA is here"
    for pair in pairs:
        for label, kernels in ways(manifest, pair, skipped):
            yield f"onnx-{label}", open_runner(folder, manifest, pair, kernels)
        if pair[0] == CPU:
            yield "onnx-cpu-plain", _plain_runner(folder, manifest)


def _run_torch(module: torch.nn.Module, device: str, x: np.ndarray, case: Case) -> np.ndarray:
    """x goes to the device, the segments stay on the CPU."""
    segments = map(to_torch, (case.seg_indptr, case.seg_slots))
    with torch.no_grad():
        return to_numpy(module(to_torch(x).to(device), *segments))


def _run_stacked(modules: LayerModules, x: np.ndarray, case: Case) -> np.ndarray:
    inputs = x, case.seg_indptr, case.seg_slots
    stacks = [to_torch(modules.stacks[stack.name]) for stack in modules.layer.stacks]
    with torch.no_grad():
        return to_numpy(modules.stacked(*map(to_torch, inputs), *stacks))


def _torchscript_runner(folder: Path, manifest: Manifest, device: str) -> Run:
    graphs = {
        layer.name: open_torchscript(resolve(folder, str(layer.torchscript)), device)
        for layer in manifest.layers
    }
    return lambda layer, x, case: _run_torch(graphs[layer.name], device, x, case)


def _plain_runner(folder: Path, manifest: Manifest) -> Run:
    graphs = {
        layer.name: open_plain_onnx(resolve(folder, str(layer.onnx))) for layer in manifest.layers
    }

    def run(layer: Layer, x: np.ndarray, case: Case) -> np.ndarray:
        segments = {"seg_indptr": case.seg_indptr, "seg_slots": case.seg_slots}
        feeds = {layer.input_name: x, **segments}
        y: np.ndarray = graphs[layer.name].run(None, feeds)[0]
        return y

    return run
