"""What a base's own graph should give with an adapter: the LoRA of one adapter added at its sites.

At every site y' = g y + (x A^T) (s g B)^T + d, the sum in float64, A, B, s, g and d by the oracle's
own reading: g is DoRA's, d what the bias changes by. A blend is y + sum_i w_i (y_i - y).
The base's part is the graph's, int4 or not; of the graft nothing is here: no slots, no masks, one
adapter at a time. It runs on the CPU.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loraexport_runtime.checking.model import Inputs, Mix, Outputs
from loraexport_runtime.contract.manifest import Manifest

from ...bases.graph import find_sites
from ...bases.graph_signature import Tokens, find_tokens
from ...graphs.behind import take_place
from ...graphs.products import Graft
from ...graphs.sessions import open_graph
from ...plan.graph import GraphPlan
from ...plan.plan import Plan
from ..oracle import ReferenceAdapter, read_adapters
from .cases import Contents

GRAPH_SOURCE = "the base's own graph, the adapter's product added in float64"


Changes = Mapping[int, Mapping[str, tuple[np.ndarray, np.ndarray]]]
"""Slot -> site -> (g, d), each [out], where an adapter has more than A and B."""


class GraphModel:
    """A graph whose sites add one LoRA, fed at every run."""

    def __init__(
        self,
        model: ir.Model,
        grafts: Sequence[Graft],
        adapters: Mapping[int, ReferenceAdapter],
        changes: Changes | None = None,
    ) -> None:
        """`model` is changed: it gets the inputs that the LoRA is fed through."""
        self._adapters = adapters
        self._changes = changes or {}
        self._layers = [graft.layer for graft in grafts]
        for index, graft in enumerate(grafts):
            _add_fed_lora(model.graph, index, graft, bool(self._changes))
        model.graph.sort()
        self.session = open_graph(model)

    def feeds(self, mix: Mix) -> dict[str, np.ndarray]:
        """What the session takes beside the graph's own inputs.

        Of a blend A and B stand side by side, each B times its weight; g = 1 + sum_i w_i (g_i - 1)
        and d = sum_i w_i d_i.
        """
        arrays = {}
        for index, layer in enumerate(self._layers):
            columns: list[np.ndarray] = [np.zeros((layer.in_features, 1))]
            rows: list[np.ndarray] = [np.zeros((1, layer.out_features))]
            for part in layer.slices:
                for slot, weight in mix:
                    if part.site in self._adapters[slot].sites:
                        a, b, scaling = self._adapters[slot].sites[part.site]
                        block = np.zeros((len(a), layer.out_features))
                        own = self._changes.get(slot, {}).get(part.site)
                        wide = weight * scaling * (b.T if own is None else b.T * own[0])
                        block[:, part.offset : part.offset + part.width] = wide
                        columns.append(a.T)
                        rows.append(block)
            arrays[f"reference.{index}.A"] = np.concatenate(columns, axis=1)
            arrays[f"reference.{index}.B"] = np.concatenate(rows)
            if self._changes:
                g, d = np.ones(layer.out_features), np.zeros(layer.out_features)
                for part in layer.slices:
                    columns_of = slice(part.offset, part.offset + part.width)
                    for slot, weight in mix:
                        if part.site in self._changes.get(slot, {}):
                            own_g, own_d = self._changes[slot][part.site]
                            g[columns_of] += weight * (own_g - 1)
                            d[columns_of] += weight * own_d
                arrays |= {f"reference.{index}.g": g, f"reference.{index}.d": d}
        return arrays


def open_rows(
    plan: Plan[GraphPlan], folder: Path, manifest: Manifest, graph: ir.Model
) -> "GraphRows":
    """The reference of an ONNX graph, which is changed."""
    tokens = find_tokens(plan, graph)
    outputs = [str(value.name) for value in graph.graph.outputs]
    graph_model = GraphModel(
        graph, find_sites(plan, plan.kind, graph, {}), read_adapters(folder, manifest)
    )
    return GraphRows(graph_model, outputs, str(plan.kind.file), tokens)


class GraphRows:
    """A graph of whole batches, as a reference for them."""

    source = GRAPH_SOURCE

    def __init__(
        self, graph: GraphModel, outputs: Sequence[str], label: str, tokens: Tokens
    ) -> None:
        self._graph = graph
        self._outputs = list(outputs)
        self.label, self.contents = label, Contents(tokens.vocabulary, tokens.pad)

    def run(self, inputs: Inputs, mix: Mix) -> Outputs:
        """See ReferenceModel."""
        feeds = {**inputs, **self._graph.feeds(mix)}
        return dict(zip(self._outputs, self._graph.session.run(self._outputs, feeds), strict=True))


def _add_fed_lora(graph: ir.Graph, index: int, graft: Graft, has_changes: bool) -> None:
    double = ir.TensorType(ir.DataType.DOUBLE)
    shapes = (
        ir.Shape([graft.layer.in_features, f"rank_{index}"]),
        ir.Shape([f"rank_{index}", graft.layer.out_features]),
    )
    a, b = (
        ir.Value(name=f"reference.{index}.{name}", shape=shape, type=double)
        for name, shape in zip("AB", shapes, strict=True)
    )
    graph.inputs.extend([a, b])
    if graft.layer.kind == "embedding":
        hidden = ir.node("Gather", [a, graft.x])
    else:
        cast = ir.node("Cast", [graft.x], {"to": ir.DataType.DOUBLE})
        graph.append(cast)
        hidden = ir.node("MatMul", [cast.outputs[0], a])
    whole = ir.node("MatMul", [hidden.outputs[0], b])
    graph.extend([hidden, whole])
    changes = []
    for name in "gd" if has_changes else "":
        shape = ir.Shape([graft.layer.out_features])
        changes.append(ir.Value(name=f"reference.{index}.{name}", shape=shape, type=double))
    graph.inputs.extend(changes)
    parts = [[value] for value in (whole.outputs[0], *changes)]
    if len(graft.nodes) > 1:
        widths = ir.Value(name=f"reference.{index}.widths", const_value=ir.tensor(graft.widths))
        graph.initializers.add(widths)
        for part in parts:
            split = ir.node("Split", [part[0], widths], {"axis": -1}, num_outputs=len(graft.nodes))
            graph.append(split)
            part[:] = split.outputs
    for node, lora, *own in zip(graft.nodes, *parts, strict=True):
        y = node.outputs[0]
        if not own:
            back = ir.node("CastLike", [lora, y])
            made = [back, ir.node("Add", [y, back.outputs[0]])]
        else:
            wide = ir.node("Cast", [y], {"to": ir.DataType.DOUBLE})
            scaled = ir.node("Mul", [wide.outputs[0], own[0]])
            both = ir.node("Add", [scaled.outputs[0], lora])
            shifted = ir.node("Add", [both.outputs[0], own[1]])
            made = [wide, scaled, both, shifted, ir.node("CastLike", [shifted.outputs[0], y])]
        graph.extend(made)
        take_place(graph, y, made[-1].outputs[0], made)
