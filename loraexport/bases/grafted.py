"""Bases that are grafted: their graph exists, or onnxruntime-genai's model builder makes it."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from loraexport_runtime.contract.manifest import Strategy

from ..graphs.products import Graft, find_grafts
from ..plan.plan import Plan
from ..plan.stacks import make_stacks
from . import decoder as causal_lm
from . import graph as onnx_graph
from .weights import Base


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


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def fit_stacks(one: Graft, num_slots: int) -> Graft:
    """The graft with the stacks that its products allow, where the plan has augmented: W is in
    them if each is a MatMul with a float weight, and else masked is the nearest form."""
    if one.layer.strategy != "augmented":
        return one
    strategy: Strategy = "augmented" if all(map(_is_plain, one.nodes)) else "masked"
    widths = one.widths if strategy == "augmented" else [one.layer.out_features]
    slot_rows = one.layer.stacks[0].slot_rows
    stacks = make_stacks(one.layer, strategy, num_slots, widths, slot_rows=slot_rows)
    return replace(one, layer=replace(one.layer, strategy=strategy, stacks=stacks))


def _is_plain(node: ir.Node) -> bool:
    weight = node.inputs[1]
    if node.op_type != "MatMul" or weight is None or weight.const_value is None:
        return False
    return weight.const_value.dtype in _FLOATS
