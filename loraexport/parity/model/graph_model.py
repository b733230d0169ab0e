"""What a base's own graph should give with an adapter: the LoRA of one adapter added at its sites.

At every site y' = y + (x A^T) (s B)^T, the sum in float64, A, B and s by the oracle's own reading.
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
from ...graphs.products import Graft, take_place
from ...graphs.sessions import open_graph
from ...plan.graph import GraphPlan
from ...plan.plan import Plan
from ..oracle import ReferenceAdapter, read_adapters

GRAPH_SOURCE = "the base's own graph, the adapter's product added in float64"


class GraphModel:
    """A graph whose sites add one LoRA, fed at every run."""

    def __init__(
        self, model: ir.Model, grafts: Sequence[Graft], adapters: Mapping[int, ReferenceAdapter]
    ) -> None:
        """`model` is changed: it gets the inputs that the LoRA is fed through."""
        self._adapters = adapters
        self._layers = [graft.layer for graft in grafts]
        for index, one in enumerate(grafts):
            _add_fed_lora(model.graph, index, one)
        model.graph.sort()
        self.session = open_graph(model)

    def feeds(self, slot: int) -> dict[str, np.ndarray]:
        """What the session takes beside the graph's own inputs; slot 0 is the base."""
        found = {}
        for index, layer in enumerate(self._layers):
            columns: list[np.ndarray] = [np.zeros((layer.in_features, 1))]
            rows: list[np.ndarray] = [np.zeros((1, layer.out_features))]
            for part in layer.slices:
                if slot and part.site in self._adapters[slot].sites:
                    a, b, scaling = self._adapters[slot].sites[part.site]
                    own = np.zeros((len(a), layer.out_features))
                    own[:, part.offset : part.offset + part.width] = scaling * b.T
                    columns.append(a.T)
                    rows.append(own)
            found[f"reference.{index}.A"] = np.concatenate(columns, axis=1)
            found[f"reference.{index}.B"] = np.concatenate(rows)
        return found


def open_rows(
    plan: Plan[GraphPlan], folder: Path, manifest: Manifest, graph: ir.Model
) -> "GraphRows":
    """The reference of an ONNX graph, which is changed."""
    tokens = find_tokens(plan, graph)
    outputs = [str(value.name) for value in graph.graph.outputs]
    made = GraphModel(
        graph, find_sites(plan, plan.kind, graph, {}), read_adapters(folder, manifest)
    )
    return GraphRows(made, outputs, str(plan.kind.file), tokens)


class GraphRows:
    """A graph of whole batches, as a reference for them."""

    source = GRAPH_SOURCE

    def __init__(
        self, graph: GraphModel, outputs: Sequence[str], label: str, tokens: Tokens
    ) -> None:
        self._graph = graph
        self._outputs = list(outputs)
        self.label, self.vocabulary, self.pad = label, tokens.vocabulary, tokens.pad

    def run(self, inputs: Inputs, mix: Mix) -> Outputs:
        """See ReferenceModel; `mix` is one adapter or none."""
        feeds = {**inputs, **self._graph.feeds(mix[0][0] if mix else 0)}
        return dict(zip(self._outputs, self._graph.session.run(self._outputs, feeds), strict=True))


def _add_fed_lora(graph: ir.Graph, index: int, one: Graft) -> None:
    double = ir.TensorType(ir.DataType.DOUBLE)
    shapes = (
        ir.Shape([one.layer.in_features, f"rank_{index}"]),
        ir.Shape([f"rank_{index}", one.layer.out_features]),
    )
    a, b = (
        ir.Value(name=f"reference.{index}.{name}", shape=shape, type=double)
        for name, shape in zip("AB", shapes, strict=True)
    )
    graph.inputs.extend([a, b])
    cast = ir.node("Cast", [one.nodes[0].inputs[0]], {"to": ir.DataType.DOUBLE})
    hidden = ir.node("MatMul", [cast.outputs[0], a])
    whole = ir.node("MatMul", [hidden.outputs[0], b])
    graph.extend([cast, hidden, whole])
    parts = [whole.outputs[0]]
    if len(one.nodes) > 1:
        widths = ir.Value(name=f"reference.{index}.widths", const_value=ir.tensor(one.widths))
        graph.initializers.add(widths)
        split = ir.node("Split", [parts[0], widths], {"axis": -1}, num_outputs=len(one.nodes))
        graph.append(split)
        parts = list(split.outputs)
    for node, part in zip(one.nodes, parts, strict=True):
        y = node.outputs[0]
        back = ir.node("CastLike", [part, y])
        add = ir.node("Add", [y, back.outputs[0]])
        graph.extend([back, add])
        take_place(graph, y, add.outputs[0], (back, add))
