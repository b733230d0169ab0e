"""An ONNX graph that exists: read, grafted, proven."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraexport_runtime.contract.manifest import Manifest, Model

from ..parity.report import Report
from ..plan.plan import Plan

if TYPE_CHECKING:  # it imports torch
    pass
from ..bases.graph_signature import read_signature
from .files import copy_tokenizer
from .manifest import make_manifest
from .progress import Progress


def _prove_graph(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, graft and verify an ONNX graph that exists."""
    from ..bases import grafted
    from ..bases import graph as onnx_graph
    from ..bases.adapters import pack_adapters
    from ..export.graft import graft
    from ..graphs.files import save_grafted
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
    signature = read_signature(plan, graph)
    model = Model(
        "onnx", False, None, signature.inputs, signature.outputs, "graphs/model.onnx", None
    )
    manifest = replace(make_manifest(plan, base), model=model)
    copy_tokenizer(plan.graph.directory, folder, model, progress)
    progress("graft multi-LoRA into it")
    sites = onnx_graph.find_sites(plan, graph, signature.layouts)
    stacks = pack_adapters(plan, base, [one.layer for one in sites])
    graft(graph, sites, stacks, plan.num_slots, plan.spec.export.dtype)
    save_grafted(graph, folder / "graphs/model.onnx")
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
