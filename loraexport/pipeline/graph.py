"""The recipe of an ONNX graph that exists: multi-LoRA is grafted into it."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from loraexport_runtime.checking.model import load_reference
from loraexport_runtime.contract.kinds import Graph, Model
from loraexport_runtime.contract.manifest import Manifest

from ..bases.adapters import pack_adapters
from ..bases.graph import NO_PLAIN_MODEL, find_sites, load_graph, load_graph_base
from ..bases.graph_signature import read_graph_signature
from ..bases.weights import Base
from ..export.graft import graft
from ..graphs.files import save_grafted
from ..graphs.tables import with_tables
from ..parity.implementations import NO_BASE
from ..parity.model.graph_model import open_rows
from ..parity.model.reference import make_reference
from ..parity.report import Report
from ..plan.graph import GraphPlan
from ..plan.plan import Plan
from .files import copy_tokenizer
from .manifest import make_manifest, marked
from .model import compare
from .progress import Progress
from .subject import Subject

_FILE = "graphs/model.onnx"


@dataclass(frozen=True)
class LoadedGraph:
    """The graph as it is, with its weights in memory."""

    plan: Plan[GraphPlan]
    base: Base
    graph: ir.Model


def load(plan: Plan[GraphPlan]) -> LoadedGraph:
    """See Recipe."""
    return LoadedGraph(plan, load_graph_base(plan, plan.kind), load_graph(plan.kind))


def export(loaded: LoadedGraph, folder: Path, progress: Progress) -> Manifest:
    """See Recipe."""
    plan, graph = loaded.plan, loaded.graph.clone()
    progress("run the graph to see its dimensions")
    seen = read_graph_signature(plan, graph)
    facts = with_tables(plan.kind.facts, graph.graph)
    blend = plan.spec.export.blend
    model = Model("onnx", blend, None, seen.inputs, seen.outputs, _FILE, None, facts)
    copy_tokenizer(plan.kind.directory, folder, model, progress)
    progress("graft multi-LoRA into it")
    sites = find_sites(plan, plan.kind, graph, seen.layouts)
    stacks = pack_adapters(plan, loaded.base, [site.layer for site in sites])
    export = plan.spec.export
    sizes = plan.num_slots, export.dtype
    found = graft(graph, sites, stacks, *sizes, export.blend, export.kernels)
    save_grafted(graph, folder / _FILE, stacks)
    layers = [planned.layer for planned in plan.layers]
    return make_manifest(plan, loaded.base, Graph(model), marked(plan, layers, found, progress))


def prove(subject: Subject[Graph], loaded: LoadedGraph | None) -> Report:
    """See Recipe."""
    folder, manifest, model = subject.folder, subject.manifest, subject.kind.model
    if loaded is None:
        reference, plain = load_reference(folder, manifest, model), NO_BASE
    else:
        oracle = open_rows(loaded.plan, folder, manifest, loaded.graph.clone())
        reference = make_reference(oracle, manifest, model, subject.spec.parity.seed)
        plain = NO_PLAIN_MODEL
    return compare(subject, model, reference, plain)
