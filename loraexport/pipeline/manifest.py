"""Plan and base -> the manifest, all but files and parity, which come last."""

import datetime
import importlib.metadata
from typing import TYPE_CHECKING

from loraexport_runtime.adapters.header import digest_adapter
from loraexport_runtime.contract.manifest import (
    FORMAT_VERSION,
    AdapterEntry,
    BaseEntry,
    Manifest,
    Model,
    ParitySummary,
)

from ..plan.plan import Plan

if TYPE_CHECKING:  # it imports torch
    from ..bases.weights import Base

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


def make_manifest(plan: Plan, base: "Base") -> Manifest:
    """Everything but files and parity, which come last."""
    model, formats = None, plan.spec.formats
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
