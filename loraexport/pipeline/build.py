"""build(): the life of a spec, top to bottom."""

import datetime
import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import save

from loraexport_runtime.adapters.config import CONFIG_FILE, WEIGHTS_FILE
from loraexport_runtime.adapters.dora import SCALES_FILE
from loraexport_runtime.adapters.header import digest_adapter
from loraexport_runtime.contract.manifest import (
    FORMAT_VERSION,
    AdapterEntry,
    BaseEntry,
    Generator,
    Manifest,
    Model,
    ParitySummary,
    cuda_reason,
)

from ..artifact import staging
from ..errors import ParityError
from ..parity.report import Report
from ..plan.plan import AdapterPlan, Plan, make_plan
from ..spec.schema import Spec, read_spec

if TYPE_CHECKING:  # it imports torch
    from ..bases.layers import Base

Progress = Callable[[str], None]
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
)
_TOOLS = (
    "loraexport",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime-genai-cuda",
    "onnxruntime-genai",
)


def build(
    spec_path: Path, out: Path, progress: Progress = lambda stage: None
) -> tuple[Path, Report]:
    """Build the artifact of a spec; give its folder, `out/<name>`, and what parity found.

    Raises:
        SpecError, BaseModelError, AdapterError, WeightsError: the input cannot be used.
        ParityError: a graph disagrees with the reference; nothing is published.
        BuildBusyError: another build of this artifact is running.
    """
    progress("plan")
    spec = read_spec(spec_path)
    plan = make_plan(spec, spec_path.parent)

    # torch is imported from here on: a plan of layers does without it.
    from ..parity import implementations as proof

    _require_onnx_device(plan, proof.has_cuda)
    prove = _prove_layers
    if plan.model:
        prove = _prove_model
    elif plan.generator or plan.graph:
        prove = _prove_graph if plan.graph and not plan.graph.generates else _prove_decoder
    with staging(out, spec.name) as stage:
        (stage.folder / "graphs").mkdir()
        for adapter in plan.adapters:
            _copy_adapter(adapter, stage.folder / "adapters" / adapter.name)
        (stage.folder / "spec.yaml").write_text(_portable(spec).to_yaml(), encoding="utf-8")

        manifest, report = prove(plan, stage.folder, progress)
        (stage.folder / "parity/parity.json").write_text(report.to_json(), encoding="utf-8")
        (stage.folder / "parity/parity.md").write_text(report.to_markdown(), encoding="utf-8")

        manifest = replace(manifest, parity=report.summary())
        if report.failures:
            raise _parity_error(report, stage.keep_failed(manifest))
        progress("publish")
        stage.publish(manifest)
    return stage.target, report


def _prove_layers(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, export and verify single layers, a graph each."""
    from ..bases.layers import build_modules, load_adapters, load_base
    from ..export.onnx import export_onnx
    from ..export.torchscript import export_torchscript
    from ..parity import implementations as proof
    from ..parity.layers import check as verify

    progress("read weights")
    dtype = plan.spec.export.dtype
    base = load_base(plan)
    modules = build_modules(plan, base, load_adapters(plan, base))
    for one in modules:
        layer = one.layer
        if layer.torchscript:
            progress(f"export {layer.name} to TorchScript")
            export_torchscript(layer, one.segmented, dtype, folder / layer.torchscript)
        if layer.onnx:
            progress(f"export {layer.name} to ONNX ({layer.strategy})")
            export_onnx(one, dtype, folder / layer.onnx)
        if layer.base_rows:
            (folder / layer.base_rows).write_bytes(save(one.base_rows))
    manifest = _manifest(plan, base)
    progress("verify")
    reference = verify.make_reference(folder, manifest, plan.spec, base)
    verify.save_reference(reference, folder)
    providers = proof.default_providers(manifest)
    return manifest, verify.check(folder, manifest, plan.spec, reference, modules, providers)


def _prove_model(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, export and verify a whole model, one graph."""
    from ..bases.model import load_model
    from ..export.onnx import export_model_onnx
    from ..export.torchscript import export_model_torchscript
    from ..parity import implementations as proof
    from ..parity.model import check as verify_model
    from ..parity.model import reference as model_reference

    progress("read weights")
    assert plan.model is not None, "the plan is of a whole model"
    base, modules = load_model(plan)
    manifest = _manifest(plan, base)
    model = manifest.model
    assert model is not None, "the manifest has what the plan has"
    if model.torchscript:
        progress("export the model to TorchScript")
        export_model_torchscript(modules, plan.spec.name, folder / model.torchscript)
    if model.onnx:
        progress(f"export the model to ONNX ({manifest.layers[0].strategy})")
        export_model_onnx(modules, plan.spec.name, folder / model.onnx)
    for path in {layer.base_rows for layer in manifest.layers if layer.base_rows}:
        (folder / path).write_bytes(save(modules.base_rows))
    for name, scales in modules.output_scales.items():
        if scales:
            (folder / "adapters" / name / SCALES_FILE).write_bytes(save(scales))
    directory, seed = plan.model.directory, plan.spec.parity.seed
    _copy_tokenizer(directory, folder / "tokenizer")
    progress("verify")
    adapters = model_reference.read_adapters(folder, manifest)
    plain = model_reference.PlainModel(directory, manifest, model, adapters)
    reference = model_reference.make_reference(plain, manifest, model, seed)
    model_reference.save_reference(reference, folder)
    providers = proof.default_providers(manifest)
    report = verify_model.check_model(
        folder, manifest, model, plan.spec, reference, (modules, directory), providers
    )
    return manifest, report


def _prove_graph(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, graft and verify an ONNX graph that exists."""
    from ..bases import grafted
    from ..bases import graph as onnx_graph
    from ..bases.layers import pack_adapters
    from ..export.graft import graft, save_grafted
    from ..parity import implementations as proof
    from ..parity.model import check as verify_model
    from ..parity.model import reference as model_reference
    from ..parity.model.graph_model import open_rows

    progress("read weights")
    assert plan.graph is not None, "the plan is of a graph"
    base = grafted.load_base(plan)
    graph = grafted.load_graph(plan, folder)
    plain = graph.clone()
    progress("run the graph to see its dimensions")
    signature = onnx_graph.read_signature(plan, graph)
    model = Model(
        "onnx", False, None, signature.inputs, signature.outputs, "graphs/model.onnx", None
    )
    manifest = replace(_manifest(plan, base), model=model)
    progress("graft multi-LoRA into it")
    sites = onnx_graph.find_sites(plan, graph, signature.layouts)
    stacks = pack_adapters(plan, base, [one.layer for one in sites])
    graft(graph, sites, stacks, plan.num_slots, plan.spec.export.dtype)
    save_grafted(graph, folder / "graphs/model.onnx")
    _copy_tokenizer(plan.graph.directory, folder / "tokenizer")
    progress("verify")
    oracle = open_rows(plan, folder, manifest, plain)
    reference = model_reference.make_reference(oracle, manifest, model, plan.spec.parity.seed)
    model_reference.save_reference(reference, folder)
    report = verify_model.check_model(
        folder,
        manifest,
        model,
        plan.spec,
        reference,
        str(grafted.plain_directory(plan)),
        proof.default_providers(manifest),
    )
    return manifest, report


def _prove_decoder(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, graft and verify a decoder that generates."""
    from ..bases.genai_folder import FOLDER, adapt_config
    from ..bases.grafted import find_sites, load_base, load_graph, plain_directory
    from ..bases.layers import pack_adapters
    from ..export.graft import graft, save_grafted
    from ..parity import implementations as proof
    from ..parity.decoder import check as verify_decoder
    from ..parity.decoder import reference as decoder_reference
    from ..parity.decoder.sources import open_decoder

    progress("read weights")
    base = load_base(plan)
    progress("build the base's graph")
    model = load_graph(plan, folder / FOLDER)
    pad = adapt_config(folder / FOLDER)
    generator = Generator(FOLDER, f"{FOLDER}/model.onnx", pad)
    sites = find_sites(plan, model)
    layers = tuple(one.layer for one in sites)
    manifest = replace(_manifest(plan, base), layers=layers, generator=generator)
    plain = model.clone()
    progress("graft multi-LoRA into it")
    dtype = plan.spec.export.dtype
    graft(model, sites, pack_adapters(plan, base, layers), plan.num_slots, dtype)
    save_grafted(model, folder / generator.onnx)
    progress("verify")
    decoder = open_decoder(plan, folder, manifest, plain)
    reference = decoder_reference.make_reference(folder, decoder, manifest, plan.spec.parity.seed)
    decoder_reference.save_reference(reference, folder)
    report = verify_decoder.check_decoder(
        folder,
        manifest,
        plan.spec,
        reference,
        plain_directory(plan),
        proof.default_providers(manifest),
    )
    return manifest, report


def _copy_tokenizer(directory: Path, folder: Path) -> None:
    """Whatever the base has of its tokenizer or image processor, for a service's use."""
    for pattern in _TOKENIZER_FILES:
        for file in sorted(directory.glob(pattern)):
            folder.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.name)


def _require_onnx_device(plan: Plan, has_cuda: Callable[[], bool]) -> None:
    spec, packed = plan.spec, plan.model.packed if plan.model else None
    why = cuda_reason(spec.export.dtype, packed) if "onnx" in spec.export.formats else None
    if why and spec.parity.onnx == "required" and not has_cuda():
        raise ParityError(
            f"{why} and there is no CUDA device here, so the ONNX graphs cannot be proven. Build on"
            " a CUDA machine, or publish them unverified with parity: {onnx: deferred} and run"
            " 'loraexport verify' there"
        )


def _portable(spec: Spec) -> Spec:
    """The spec as the artifact carries it: its adapters are the artifact's own copies."""
    copies = [
        adapter.model_copy(update={"path": f"adapters/{adapter.name}"}) for adapter in spec.adapters
    ]
    return spec.model_copy(update={"adapters": tuple(copies)})


def _copy_adapter(adapter: AdapterPlan, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter.header.path / name, folder / name)


def _manifest(plan: Plan, base: "Base") -> Manifest:
    """Everything but files and parity, which come last."""
    model, formats = None, plan.spec.export.formats
    if plan.model is not None:
        model = Model(
            plan.model.task,
            plan.model.blend,
            plan.model.packed,
            plan.model.inputs,
            plan.model.outputs,
            onnx="graphs/model.onnx" if "onnx" in formats else None,
            torchscript="graphs/model.ts" if "torchscript" in formats else None,
        )
    return Manifest(
        format_version=FORMAT_VERSION,
        name=plan.spec.name,
        kind=plan.spec.base.kind,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dtype=plan.spec.export.dtype,
        spec_digest=plan.spec.digest(),
        num_slots=plan.num_slots,
        layers=tuple(one.layer for one in plan.layers),
        model=model,
        generator=None,
        adapters=tuple(
            AdapterEntry(
                name=adapter.name,
                path=f"adapters/{adapter.name}",
                digest=digest_adapter(adapter.header.path),
                scale=adapter.scale,
                slot=adapter.slot,
                sites=adapter.sites,
                heads=adapter.heads,
            )
            for adapter in plan.adapters
        ),
        base=BaseEntry(plan.base_source, base.digest, base.digests),
        parity=ParitySummary("deferred", (), None, 0.0),
        tools=_tool_versions(),
        files={},
    )


def _tool_versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _parity_error(report: Report, kept: Path) -> ParityError:
    worst = max(report.failures, key=lambda row: row.error if row.error == row.error else 1e30)
    gain = "" if worst.gain is None else f", gain {worst.gain:.4f}"
    return ParityError(
        f"{len(report.failures)} of {len(report.rows)} comparisons failed; nothing was published."
        f" Worst: {worst.implementation}, layer {worst.layer!r}, site {worst.site!r}, adapter"
        f" {worst.adapter!r}: error {worst.error:.2e} (tolerance {report.tolerance:.0e}){gain}."
        f" Report and inputs: {kept / 'parity'}. Repeat: loraexport verify {kept}"
    )
