"""build(): the life of a spec, top to bottom."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraexport_runtime.checking.rows import describe_failure, largest
from loraexport_runtime.contract.graphs import check_graphs
from loraexport_runtime.contract.manifest import Manifest, cuda_reason

from ..artifact import Staging, staging
from ..errors import ParityError, UsageError
from ..plan.model import ModelPlan
from ..plan.plan import AnyPlan, make_plan
from ..spec.reader import read_spec
from .files import copy_adapter, portable
from .progress import Progress

if TYPE_CHECKING:  # it imports torch
    from ..parity.report import Report


def build(
    spec_path: Path, out: Path, progress: Progress = lambda stage: None
) -> "tuple[Path, Report]":
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
    from ..parity.implementations import default_providers, has_cuda
    from .recipe import RECIPES
    from .subject import Subject

    _require_onnx_device(plan, has_cuda)
    _require_memory(plan)
    with staging(out, spec.name) as stage:
        loaded, manifest = export(plan, stage, progress)
        check_graphs(stage.folder, manifest)
        progress("verify")
        providers = default_providers(manifest)
        subject = Subject(
            stage.folder,
            manifest,
            manifest.kind,
            spec,
            providers,
            torchscript=True,
            keep_cases=True,
        )
        report = RECIPES[plan.kind.tag].prove(subject, loaded)
        (stage.folder / "parity/parity.json").write_text(report.to_json(), encoding="utf-8")
        (stage.folder / "parity/parity.md").write_text(report.to_markdown(), encoding="utf-8")

        manifest = replace(manifest, parity=report.summary())
        if report.failures:
            raise _parity_error(report, stage.keep_failed(manifest))
        progress("publish")
        stage.publish(manifest)
    return stage.target, report


def export(plan: AnyPlan, stage: Staging, progress: Progress) -> tuple[Any, Manifest]:
    """Write all that an artifact holds but its proof; give what the recipe has loaded for that, and
    the manifest."""
    from .recipe import RECIPES

    recipe = RECIPES[plan.kind.tag]
    (stage.folder / "graphs").mkdir()
    for adapter in plan.adapters:
        copy_adapter(adapter, stage.folder / "adapters" / adapter.name)
    spec = portable(plan.spec)
    (stage.folder / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    progress("read weights")
    loaded = recipe.load(plan)
    return loaded, stage.list_files(recipe.export(loaded, stage.folder, progress))


def _require_memory(plan: AnyPlan) -> None:
    """Raise UsageError if this machine cannot hold what the build allocates at once."""
    needed = sum(layer.base_bytes + layer.lora_bytes for layer in plan.layers)
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > room:
        raise UsageError(
            f"{plan.num_slots} slots of rank {plan.max_rank} and the base's weights at their sites"
            f" are {needed / 2**30:,.1f} GiB, and this machine has {room / 2**30:,.1f} GiB; give"
            " fewer slots or a smaller max_rank, or build on a larger machine"
        )


def _require_onnx_device(plan: AnyPlan, has_cuda: Callable[[], bool]) -> None:
    spec, packed = plan.spec, plan.kind.packed if isinstance(plan.kind, ModelPlan) else None
    why = cuda_reason(spec.export.dtype, packed) if "onnx" in spec.formats else None
    if why and spec.parity.onnx == "required" and not has_cuda():
        raise ParityError(
            f"{why} and there is no CUDA device here, so the ONNX graphs cannot be proven. Build on"
            " a CUDA machine, or publish them unverified with parity: {onnx: deferred} and run"
            " 'loraexport verify' there"
        )


def _parity_error(report: "Report", folder: Path) -> ParityError:
    of_base = [row for row in report.failures if row.adapter == "base"]
    worst = largest(of_base or report.failures)
    hint = " The base fails by itself: its graph differs, not an adapter." if of_base else ""
    return ParityError(
        f"{len(report.failures)} of {len(report.rows)} comparisons failed; nothing was published."
        f" Worst: {describe_failure(worst, report.tolerance, report.gain_tolerance)}.{hint}"
        f" Report and inputs: {folder / 'parity'}. Repeat: loraexport verify {folder}"
    )
