"""A whole model's graphs -> Report: every implementation against a float64 model, and PEFT.

Padding is not compared.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from loraexport_runtime.checking.model import (
    Inputs,
    ModelReference,
    Outputs,
    RowCase,
    Run,
    compare_model,
    open_runner,
)
from loraexport_runtime.checking.rows import MODEL_TOLERANCES, Comparison
from loraexport_runtime.checking.ways import ways
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.kinds import ADAPTER_WEIGHTS, Model
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import CPU, normalise_providers
from loraexport_runtime.errors import LoraexportError, shorten

from ...bases.model import ModelModules
from ...errors import ExportError
from ...graphs.sessions import open_plain_onnx
from ...hf.sentences.tail import Tail
from ...spec.schema import Spec
from ...tensors import to_numpy, to_torch
from ..implementations import NO_TORCHSCRIPT, NOT_ASKED, open_torchscript, torch_devices
from ..report import Report, make_report, tolerance_of


def check_model(
    folder: Path,
    manifest: Manifest,
    model: Model,
    spec: Spec,
    reference: ModelReference,
    plain: tuple[ModelModules, Path, Tail | None] | str,
    providers: Sequence[str],
    torchscript: bool,
) -> Report:
    """Run every implementation on every case and compare.

    Args:
        plain: the eager model, the base's directory and what is behind its model, or why there
            are none.
        torchscript: whether to run what torch.jit loads, which may be any code.
    """
    tolerance = tolerance_of(
        spec, MODEL_TOLERANCES, None if model.onnx is None else resolve(folder, model.onnx)
    )
    skipped: dict[str, str] = {}
    rows: list[Comparison] = []
    every = _implementations(folder, manifest, model, plain, providers, torchscript, skipped)
    for name, run in every:
        blends = name != "peft"  # PEFT blends by other rules
        with _named(name, model):
            rows += compare_model(name, run, manifest, model, reference, tolerance, blends)
    has_onnx = model.onnx is not None
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx)


@contextmanager
def _named(implementation: str, model: Model) -> Iterator[None]:
    """What torch or onnxruntime raises where a graph is run as an ExportError that says which."""
    try:
        yield
    except LoraexportError:
        raise
    except Exception as error:  # theirs; onnxruntime's have no class of their own
        said = shorten((str(error).strip().splitlines() or ["no message"])[0], 500)
        format = implementation.partition("-")[0]
        files = {"torchscript": model.torchscript, "onnx": model.onnx}
        others = [name for name, path in files.items() if path is not None and name != format]
        advice = ""
        if format in files and others:
            advice = f". As {others[0]} it can be made: set export: {{formats: [{others[0]}]}}"
        raise ExportError(f"{implementation} does not run: {said}{advice}") from error


def _implementations(
    folder: Path,
    manifest: Manifest,
    model: Model,
    plain: tuple[ModelModules, Path, Tail | None] | str,
    providers: Sequence[str],
    torchscript: bool,
    skipped: dict[str, str],
) -> Iterator[tuple[str, Run]]:
    pairs = normalise_providers(providers) if providers else []
    output = model.outputs[0].name
    if isinstance(plain, str):
        skipped |= {"eager": plain, "peft": plain}
    else:
        yield "eager", _eager_runner(plain[0], output)
        if importlib.util.find_spec("peft") is None:
            skipped["peft"] = "peft is not installed"
        else:
            from .peft_model import PeftReference

            peft = PeftReference(folder, manifest, model, *plain[1:])
            yield "peft", lambda inputs, case: {output: peft.run(inputs, case)}
    if model.torchscript is not None and torchscript:
        path = resolve(folder, model.torchscript)
        for device in torch_devices([name for name, _ in pairs]):
            yield f"torchscript-{device}", _torchscript_runner(path, manifest, model, device)
    else:
        skipped["torchscript"] = NO_TORCHSCRIPT if model.torchscript else NOT_ASKED
    if model.onnx is None:
        skipped["onnx"] = NOT_ASKED
        return
    if not pairs:
        skipped["onnx"] = f"{manifest.needs_cuda}, and no CUDA is here"
    for pair in pairs:
        for label, kernels in ways(manifest, pair, skipped):
            yield f"onnx-{label}", open_runner(folder, manifest, model, pair, kernels)
        if pair[0] == CPU:
            yield "onnx-cpu-plain", _plain_runner(resolve(folder, model.onnx), manifest, model)


def _eager_runner(modules: ModelModules, output: str) -> Run:
    stacks = [to_torch(value) for value in modules.stacks.values()]

    def run(inputs: Inputs, case: RowCase) -> Outputs:
        tensors = {name: to_torch(value) for name, value in inputs.items()}
        weights = None
        if modules.blend_slots is not None:
            weights = torch.from_numpy(case.adapter_weights(modules.blend_slots))
        ids = torch.from_numpy(case.adapter_ids)
        with torch.no_grad():
            return {output: to_numpy(modules.module(tensors, ids, stacks, weights))}

    return run


def _torchscript_runner(path: Path, manifest: Manifest, model: Model, device: str) -> Run:
    graph = open_torchscript(path, device)

    def run(inputs: Inputs, case: RowCase) -> Outputs:
        arrays = [*(inputs[entry.name] for entry in model.inputs), case.adapter_ids]
        if model.blend:
            arrays.append(case.adapter_weights(manifest.num_slots))
        with torch.no_grad():
            y = graph(*(to_torch(array).to(device) for array in arrays))
        return {model.outputs[0].name: to_numpy(y)}

    return run


def _plain_runner(path: Path, manifest: Manifest, model: Model) -> Run:
    graph = open_plain_onnx(path)
    outputs = [entry.name for entry in model.outputs]

    def run(inputs: Inputs, case: RowCase) -> Outputs:
        feeds = {**inputs, "adapter_ids": case.adapter_ids}
        weights = case.adapter_weights(manifest.num_slots)
        if model.blend and weights.any():  # an input that need not be fed
            feeds[ADAPTER_WEIGHTS] = weights
        return dict(zip(outputs, graph.run(outputs, feeds), strict=True))

    return run
