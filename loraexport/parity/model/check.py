"""A whole model's graphs -> Report: every implementation against a float64 model, and PEFT.

Padding is not compared.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from loraexport_runtime import ModelSession
from loraexport_runtime.adapters.packing import lowest
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.dtypes import NUMPY_DTYPES
from loraexport_runtime.device.providers import CPU, normalise_providers
from loraexport_runtime.slots.batch import Row as Names

from ...bases.model import ModelModules
from ...graphs.sessions import open_plain_onnx
from ...spec.schema import Spec
from ...tensors import to_numpy, to_torch
from ..implementations import open_torchscript, torch_devices
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
from .cases import BASE, Inputs, Mix, Outputs, RowCase, kept_tokens, make_cases, only
from .reference import ModelReference

Run = Callable[[Inputs, RowCase], Outputs]
"""(inputs by name, what each row uses) -> the model's outputs by name."""


def check_model(
    folder: Path,
    manifest: Manifest,
    model: Model,
    spec: Spec,
    reference: ModelReference,
    plain: tuple[ModelModules, Path] | str,
    providers: Sequence[str],
) -> Report:
    """Run every implementation on every case and compare.

    Args:
        plain: the eager model and the base's directory, or why there are none.
    """
    tolerance = tolerance_of(spec, MODEL_TOLERANCES)
    skipped: dict[str, str] = {}
    rows: list[Row] = []
    every = _implementations(folder, manifest, model, plain, providers, skipped)
    for name, run in every:
        rows += _compare(name, run, manifest, model, reference, tolerance)
    has_onnx = model.onnx is not None
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx)


def _compare(
    name: str,
    run: Run,
    manifest: Manifest,
    model: Model,
    reference: ModelReference,
    tolerance: Tolerance,
) -> list[Row]:
    names: dict[Mix, str] = {BASE: "base"}
    names |= {only(slot): adapter for slot, adapter in sorted(slot_names(manifest).items())}
    has_base = all(layer.in_base for layer in manifest.layers)
    parts: dict[tuple[str, str], list[list[np.ndarray]]] = {
        (entry.name, who): [] for entry in model.outputs for who in (*names.values(), "blend")
    }
    for case in make_cases(manifest, model):
        inputs = reference.inputs[case.name]
        expected, base = reference.expected[case.name], reference.base_expected[case.name]
        found = run(inputs, case)
        base_case = RowCase(case.name, (BASE,) * len(case.rows), case.lengths, case.left)
        base_found = run(inputs, base_case) if has_base else base
        for entry in model.outputs:
            four = [one[entry.name] for one in (found, expected, base_found, base)]
            if any(layer.labels for layer in manifest.layers):
                missing = lowest(NUMPY_DTYPES[manifest.dtype])
                four[:2] = _without_missing_labels(four[0], four[1], missing)
                four[2:] = _without_missing_labels(four[2], four[3], missing)
            for mix in set(case.rows):
                if name == "peft" and mix not in names:
                    continue  # PEFT blends by other rules
                tokens = kept_tokens(inputs, entry)
                own = np.array([row == mix for row in case.rows])
                keep = (tokens.T & own).T
                parts[entry.name, names.get(mix, "blend")].append([one[keep] for one in four])
    rows = []
    for (output, who), pieces in parts.items():
        if pieces:
            y, ref, y_base, ref_base = (np.concatenate(one) for one in zip(*pieces, strict=True))
            labels = (name, model.task, output, who)
            rows.append(compare(labels, y, ref, y_base, ref_base, tolerance))
    return rows


def _without_missing_labels(
    y: np.ndarray, expected: np.ndarray, missing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Zeros for the labels that a row's head lacks, NaN where y gives one to such a row."""
    lacks = expected == np.float32(missing)
    wrong = lacks & (y.astype(np.float32) != np.float32(missing))
    zeroed = np.where(lacks, 0, y.astype(np.float64))
    return np.where(wrong, np.nan, zeroed), np.where(lacks, 0, expected)


def _implementations(
    folder: Path,
    manifest: Manifest,
    model: Model,
    plain: tuple[ModelModules, Path] | str,
    providers: Sequence[str],
    skipped: dict[str, str],
) -> Iterator[tuple[str, Run]]:
    names = [name for name, _ in normalise_providers(providers)] if providers else []
    output = model.outputs[0].name
    if isinstance(plain, str):
        skipped |= {"eager": plain, "peft": plain}
    else:
        yield "eager", _eager_runner(plain[0], output)
        if importlib.util.find_spec("peft") is None:
            skipped["peft"] = "peft is not installed"
        else:
            from .peft_model import PeftReference

            peft = PeftReference(folder, manifest, model, plain[1])
            yield "peft", lambda inputs, case: {output: peft.run(inputs, case)}
    if model.torchscript is not None:
        path = resolve(folder, model.torchscript)
        for device in torch_devices(names):
            yield f"torchscript-{device}", _torchscript_runner(path, manifest, model, device)
    else:
        skipped["torchscript"] = "the spec does not ask for it"
    if model.onnx is None:
        skipped["onnx"] = "the spec does not ask for it"
        return
    if not names:
        skipped["onnx"] = f"{manifest.needs_cuda}, and no CUDA is here"
    for name in names:
        short = name.removesuffix("ExecutionProvider").lower()
        session = ModelSession(folder, manifest, model, normalise_providers([name]), None)
        yield f"onnx-{short}", _session_runner(session, slot_names(manifest))
        if name == CPU:
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


def _session_runner(session: ModelSession, names: Mapping[int, str]) -> Run:
    def run(inputs: Inputs, case: RowCase) -> Outputs:
        rows = [_row_names(row, names) for row in case.rows]
        return session.run(inputs, rows)

    return run


def _row_names(row: Mix, names: Mapping[int, str]) -> Names:
    if row == BASE:
        return None
    if row == only(row[0][0]):
        return names[row[0][0]]
    return {names[slot]: weight for slot, weight in row}


def _plain_runner(path: Path, manifest: Manifest, model: Model) -> Run:
    graph = open_plain_onnx(path)
    outputs = [entry.name for entry in model.outputs]

    def run(inputs: Inputs, case: RowCase) -> Outputs:
        feeds = {**inputs, "adapter_ids": case.adapter_ids}
        weights = case.adapter_weights(manifest.num_slots)
        if model.blend and weights.any():  # an input that need not be fed
            feeds["adapter_weights"] = weights
        return dict(zip(outputs, graph.run(outputs, feeds), strict=True))

    return run
