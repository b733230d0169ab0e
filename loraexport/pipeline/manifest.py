"""Plan, base and kind -> the manifest, all but files and parity, which come last."""

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence

from loraexport_runtime.contract.kinds import Kind
from loraexport_runtime.contract.manifest import (
    FORMAT_VERSION,
    AdapterEntry,
    BaseEntry,
    Function,
    Layer,
    Manifest,
    ParitySummary,
)

from ..bases.weights import Base
from ..export.outline import with_functions
from ..plan.plan import AnyPlan
from .progress import Progress

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
    "tokenizers",
    "Jinja2",
)


def make_manifest(
    plan: AnyPlan, base: Base, kind: Kind, layers: Sequence[Layer] | None = None
) -> Manifest:
    """Everything but files and parity.

    Args:
        layers: as they are in the graph; default: as they were planned.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        name=plan.spec.name,
        kind=kind,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dtype=plan.spec.export.dtype,
        spec_digest=plan.spec.digest(),
        num_slots=plan.num_slots,
        layers=tuple(layers or (planned.layer for planned in plan.layers)),
        adapters=tuple(
            AdapterEntry(
                name=adapter.name,
                path=f"adapters/{adapter.name}",
                digest=adapter.header.files.digest(),
                scale=adapter.scale,
                slot=adapter.slot,
                sites=adapter.sites,
                heads=adapter.heads,
            )
            for adapter in plan.adapters
        ),
        base=BaseEntry(plan.base_source, base.digest, base.digests, plan.kind.naming, base.missing),
        parity=ParitySummary("deferred", (), None, 0.0),
        tools=_tool_versions(),
        files={},
    )


def marked(
    plan: AnyPlan, layers: Sequence[Layer], found: Mapping[str, Function], progress: Progress
) -> Sequence[Layer]:
    """The layers with the functions that their graphs call, if the spec asks for them.

    Raises:
        ExportError: it does, and no graph calls one.
    """
    if not plan.spec.export.kernels:
        return layers
    with_them, said = with_functions(layers, found, plan.num_slots)
    progress(said)
    return with_them


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in _TOOLS:
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
