"""Bases that are grafted: their graph exists, or onnxruntime-genai's model builder makes it."""

from pathlib import Path

import onnx_ir as ir

from ..export.graft import fit_stacks
from ..graphs.products import Graft, find_grafts
from ..plan.plan import Plan
from . import decoder as causal_lm
from . import graph as onnx_graph
from .layers import Base


def plain_directory(plan: Plan) -> Path | str:
    """The Hugging Face model whose numbers the graph has, or why there is none."""
    if plan.generator is None:
        return "the base is an ONNX graph"
    if plan.spec.base.kind == "causal_lm" and plan.spec.base.weights == "int4":
        return "its base has float weights, the graph's are int4"
    return plan.generator.directory


def load_base(plan: Plan) -> Base:
    """What the base's sites hold, and its digest.

    Raises:
        BaseModelError: the base cannot be used.
    """
    return onnx_graph.load_base(plan) if plan.graph else causal_lm.load_base(plan)


def load_graph(plan: Plan, folder: Path) -> ir.Model:
    """The base's graph in memory; the files that go with a generator are written to `folder`.

    Raises:
        BaseModelError: there is none, or it cannot be made.
    """
    load = onnx_graph.load_graph if plan.graph else causal_lm.build_graph
    return load(plan, folder)


def find_sites(plan: Plan, model: ir.Model) -> list[Graft]:
    """Where the plan's layers are in the base's graph.

    Raises:
        BaseModelError: a site is not there.
    """
    if plan.graph:
        return onnx_graph.find_sites(plan, model, {})
    found = find_grafts(model.graph, [one.layer for one in plan.layers])
    return [fit_stacks(one, plan.num_slots) for one in found]
