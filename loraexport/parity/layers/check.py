"""Graphs of an artifact folder -> Report: every implementation against the float64 oracle.

`check` does the work, for a build (on its staging folder) and for `loraexport verify` alike. The
ONNX graphs run through loraexport_runtime, the code that services use.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save

from loraexport_runtime import AdapterError, ArtifactError, Session, WeightsError
from loraexport_runtime.contract.manifest import Layer, Manifest, Model, resolve
from loraexport_runtime.device.providers import CPU, normalise_providers

from ...bases.layers import Base, LayerModules, build_modules, load_adapters, load_base
from ...errors import BaseModelError, UsageError
from ...plan.plan import Plan, make_plan
from ...spec.schema import Spec, read_spec
from ...tensors import to_numpy, to_torch
from ..implementations import (
    CASES_FILE,
    default_providers,
    make_report,
    open_plain_onnx,
    open_torchscript,
    slot_names,
    tolerance_of,
    torch_devices,
)
from ..oracle import read_reference_adapter, reference_output
from ..report import TOLERANCES, Report, Row, Tolerance, compare
from .cases import Case, make_cases, make_input

Run = Callable[[Layer, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(layer, x, seg_indptr, seg_slots) -> y."""


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
    tolerance = tolerance_of(spec, TOLERANCES)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for name, run in _implementations(folder, manifest, modules, providers, skipped):
        for layer in manifest.layers:
            rows += _check_layer(
                name, run, layer, cases, reference, slot_names(manifest), tolerance
            )
    has_onnx = any(layer.onnx for layer in manifest.layers)
    return make_report(reference.source, manifest, tolerance, rows, skipped, has_onnx)


def verify_artifact(
    folder: Path,
    manifest: Manifest,
    base_directory: Path | None = None,
    providers: Sequence[str] | None = None,
) -> Report:
    """Repeat an artifact's parity, perhaps on another machine.

    The base is taken from `base_directory` or where the spec says, if its digest is the
    artifact's; else the stored cases are the reference, and the report says so.

    Raises:
        ArtifactError: the artifact is damaged, or holds no spec.
        BaseModelError: `base_directory` was given and is not the artifact's base.
        ProviderError: a provider cannot run here.
        UsageError: `base_directory` was given for a base that a seed makes.
    """
    manifest.check_files(folder)
    spec_file = folder / "spec.yaml"
    if not spec_file.is_file():
        raise ArtifactError(f"{spec_file}: missing; copy the whole artifact")
    spec = read_spec(spec_file)
    if base_directory is not None:
        if spec.base.path is None:
            raise UsageError(f"{folder}: its base is drawn from a seed; leave --base out")
        path = str(base_directory.absolute())
        spec = spec.model_copy(update={"base": spec.base.model_copy(update={"path": path})})
    chosen = providers or default_providers(manifest)
    try:
        plan = make_plan(spec, folder)
        return _check_with_base(folder, manifest, plan, chosen)
    except (BaseModelError, WeightsError, AdapterError) as error:
        if base_directory is not None:
            raise
        source = f"the stored cases (no base here: {error}; give it with --base)"
    if manifest.generator is not None:
        from ..decoder import check as verify_decoder
        from ..decoder import reference as decoder_reference

        kept = replace(decoder_reference.load_reference(folder), source=source)
        return verify_decoder.check_decoder(
            folder, manifest, spec, kept, "the base is not here", chosen
        )
    if manifest.model is not None:
        from ..model import check as verify_model
        from ..model import reference as model_reference

        stored = replace(model_reference.load_reference(folder), source=source)
        return verify_model.check_model(
            folder, manifest, manifest.model, spec, stored, "the base is not here", chosen
        )
    return check(folder, manifest, spec, replace(load_reference(folder), source=source), (), chosen)


def _check_with_base(
    folder: Path, manifest: Manifest, plan: Plan, providers: Sequence[str]
) -> Report:
    """Against the oracle. Raises BaseModelError if the base is not the artifact's."""
    if manifest.generator is not None:
        from ...bases import grafted
        from ..decoder import check as verify_decoder
        from ..decoder import reference as decoder_reference
        from ..decoder.sources import open_decoder

        _require_same(grafted.load_base(plan), manifest, plan)
        decoder = open_decoder(plan, folder, manifest)
        seed = plan.spec.parity.seed
        decoded = decoder_reference.make_reference(folder, decoder, manifest, seed)
        plain = grafted.plain_directory(plan)
        return verify_decoder.check_decoder(folder, manifest, plan.spec, decoded, plain, providers)
    if manifest.model is not None:
        return _check_model(folder, manifest, manifest.model, plan, providers)
    base = load_base(plan)
    _require_same(base, manifest, plan)
    modules = build_modules(plan, base, load_adapters(plan, base))
    oracle = make_reference(folder, manifest, plan.spec, base)
    return check(folder, manifest, plan.spec, oracle, modules, providers)


def _check_model(
    folder: Path, manifest: Manifest, model: Model, plan: Plan, providers: Sequence[str]
) -> Report:
    from ...bases import grafted
    from ...bases.model import ModelModules, load_model
    from ..model import check as verify_model
    from ..model import reference as model_reference
    from ..model.graph_model import open_rows

    oracle: model_reference.ReferenceModel
    plain: tuple[ModelModules, Path] | str
    if plan.graph:
        _require_same(grafted.load_base(plan), manifest, plan)
        graph = grafted.load_graph(plan, folder)
        oracle = open_rows(plan, folder, manifest, graph)
        plain = str(grafted.plain_directory(plan))
    else:
        assert plan.model is not None, "spec and manifest are of one kind"
        base, modules = load_model(plan)
        _require_same(base, manifest, plan)
        directory, adapters = plan.model.directory, model_reference.read_adapters(folder, manifest)
        oracle = model_reference.PlainModel(directory, manifest, model, adapters)
        plain = modules, directory
    seed = plan.spec.parity.seed
    reference = model_reference.make_reference(oracle, manifest, model, seed)
    return verify_model.check_model(folder, manifest, model, plan.spec, reference, plain, providers)


def _require_same(base: Base, manifest: Manifest, plan: Plan) -> None:
    if base.digest != manifest.base.digest:
        raise BaseModelError(
            f"{plan.base_source}: its weights differ from those that the artifact was built from"
        )


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
        session = Session(folder, manifest, normalise_providers([name]), None)
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


def _session_runner(session: Session) -> Run:
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
