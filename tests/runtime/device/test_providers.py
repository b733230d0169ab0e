"""Views of an OrtValue's rows: written in place, without a copy, and freed in any order."""

import ctypes
import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from loraexport_runtime.contract.manifest import Stack
from loraexport_runtime.device.dlpack import rows_view
from loraexport_runtime.device.dtypes import ONNX_TYPES
from loraexport_runtime.device.memory import host_value
from loraexport_runtime.device.providers import CPU, CUDA, with_varied_shapes
from loraexport_runtime.slots.buffers import StackBuffer

STACK = Stack("layer.lora_B", "lora_B", (6, 3), rows_per_slot=2, row_offset=2, column_offset=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_slot_is_written_in_place(dtype: str) -> None:
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    initial = np.arange(18).reshape(6, 3).astype(numpy_dtype)
    buffer = StackBuffer(STACK, initial, dtype, ("cpu", 0))
    address = buffer.value.data_ptr()
    buffer.write(2, np.full((2, 3), -1, numpy_dtype))
    assert buffer.value.data_ptr() == address
    found = ctypes.string_at(address, initial.nbytes)
    expected = initial.copy()
    expected[4:6] = -1
    assert found == expected.tobytes()


def test_a_session_sees_the_write_after_the_view_is_gone(tmp_path: Path) -> None:
    """onnxruntime takes only memory that its OrtValue does not own; the view is that."""
    stack = helper.make_tensor_value_info("b", TensorProto.FLOAT, [6, 3])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    node = helper.make_node("Gemm", ["x", "b"], ["y"])
    default = numpy_helper.from_array(np.zeros((6, 3), np.float32), "b")
    graph = helper.make_graph([node], "g", [x, stack], [y], [default])
    opset = [helper.make_opsetid("", 23)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "g.onnx")

    memory = ort.OrtValue.ortvalue_from_shape_and_type([6, 3], ONNX_TYPES["float32"], "cpu", 0)
    memory.update_inplace(host_value(np.ones((6, 3), np.float32), "float32"))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with pytest.raises(RuntimeError, match="must be owned by the user"):
        options.add_initializer("b", memory)
    view = rows_view(memory, slice(0, 6), 3, "float32")  # the options keep no reference to it
    options.add_initializer("b", view)
    session = ort.InferenceSession(tmp_path / "g.onnx", options, providers=["CPUExecutionProvider"])
    del options, view
    gc.collect()
    feeds = {"x": np.ones((1, 6), np.float32)}
    assert session.run(None, feeds)[0].tolist() == [[6, 6, 6]]
    part = rows_view(memory, slice(1, 2), 3, "float32")
    part.update_inplace(host_value(np.full((1, 3), 11, np.float32), "float32"))
    del part
    gc.collect()
    assert session.run(None, feeds)[0].tolist() == [[16, 16, 16]]


def test_attention_of_varied_shapes() -> None:
    """All of onnxruntime's kernels but cuDNN's, unless the provider's options say which."""
    found = with_varied_shapes([(CUDA, {"device_id": 1}), (CUDA, {"sdpa_kernel": "0"}), (CPU, {})])
    cudnn = 8
    assert found[0][1].keys() == {"device_id", "sdpa_kernel"}
    assert int(found[0][1]["sdpa_kernel"]) & cudnn == 0
    assert found[1:] == [(CUDA, {"sdpa_kernel": "0"}), (CPU, {})]
