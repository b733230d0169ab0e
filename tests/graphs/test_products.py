"""Products and look-ups of a graph, found by what their nodes and weights are called."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from loraexport.errors import BaseModelError
from loraexport.graphs.products import find_grafts
from loraexport.plan.sites import site_layer

VOCABULARY, SIZE = 6, 32


def shared_table(axis: int = 0) -> ir.Model:
    """The table of a decoder with tied embeddings in int4, as the model builder writes it: rows of
    the output layer's weights."""
    weights = {
        "lm_head.MatMul.weight_Q4": np.zeros((VOCABULARY, 1, SIZE // 2), np.uint8),
        "lm_head.MatMul.weight_scales": np.ones((VOCABULARY, 1), np.float32),
        "sizes": np.array([VOCABULARY, SIZE // 2]),
    }
    place = "/model/embed_tokens"
    nodes = [
        helper.make_node(
            "Reshape", ["lm_head.MatMul.weight_Q4", "sizes"], ["rows"], f"{place}/Reshape"
        ),
        helper.make_node(
            "GatherBlockQuantized",
            ["rows", "input_ids", "lm_head.MatMul.weight_scales"],
            ["x"],
            f"{place}/GatherBlockQuantized",
            domain="com.microsoft",
            bits=4,
            block_size=SIZE,
            gather_axis=axis,
            quantize_axis=1,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", SIZE])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=[
            helper.make_tensor_value_info("rows", TensorProto.UINT8, [VOCABULARY, SIZE // 2])
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_a_table_that_shares_the_output_layers_int4() -> None:
    layer = site_layer({"model.embed_tokens": SIZE}, VOCABULARY, "embedding", 4)
    (graft,) = find_grafts(shared_table().graph, [layer])
    assert [node.op_type for node in graft.nodes] == ["GatherBlockQuantized"]
    assert (graft.x.name, graft.widths) == ("input_ids", (SIZE,))


def test_a_site_of_other_sizes_or_of_none() -> None:
    wider = site_layer({"model.embed_tokens": 2 * SIZE}, VOCABULARY, "embedding", 4)
    with pytest.raises(BaseModelError, match="maps 6 to 32 features, the model 6 to 64"):
        find_grafts(shared_table().graph, [wider])
    layer = site_layer({"model.embed_tokens": SIZE}, VOCABULARY, "embedding", 4)
    with pytest.raises(BaseModelError, match="the base's graph has no look-up of this name"):
        find_grafts(shared_table(axis=1).graph, [layer])
