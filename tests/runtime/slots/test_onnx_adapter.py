"""The slots as `.onnx_adapter` files: onnxruntime's LoraAdapter gives what the runtime gives."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.builds import write_tenants
from support.home import Home

import loraexport_runtime as lr
from loraexport_runtime.slots import onnx_adapter

CASES = [
    ("masked", "float32"),
    ("augmented", "float16"),
    pytest.param("chunked", "float32", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def built(home: Home) -> Callable[[str, str], Path]:
    """(strategy, dtype) -> an artifact of two slots and three adapters."""

    def artifact(strategy: str, dtype: str) -> Path:
        export = {"formats": ["onnx"], "strategy": strategy, "dtype": dtype}
        return home.artifact(write_tenants, export=export)

    return artifact


def open_graph(artifact: Path, layer: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    path = artifact / f"graphs/{layer}.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(layer: str, dtype: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((7, 32)).astype(dtype)
    tokens = {"ids": generator.integers(0, 40, 7)} if layer == "words" else {"x": x}
    return tokens | {"seg_indptr": np.array([0, 2, 4, 7]), "seg_slots": np.array([1, 2, 0])}


def run_file(graph: ort.InferenceSession, file: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    adapter = ort.LoraAdapter()
    adapter.Load(str(file))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    y: np.ndarray = graph.run(None, feed, options)[0]
    return y


@pytest.mark.parametrize(("strategy", "dtype"), CASES)
def test_the_same_bits_as_the_runtime(
    built: Callable[[str, str], Path], strategy: str, dtype: str, tmp_path: Path
) -> None:
    artifact = built(strategy, dtype)
    session = lr.load(artifact, threads=1)
    session.load_adapter("spare", scale=2.0)  # pages sql out
    assert session.export_adapters(tmp_path / "out") == {"chat": 2, "spare": 1}
    for name, layer in session.items():
        feed = feeds(name, dtype)
        graph = open_graph(artifact, name)
        y = run_file(graph, tmp_path / f"out/{name}.onnx_adapter", feed)
        x = next(iter(feed.values()))
        wanted = layer.run(x, seg_indptr=feed["seg_indptr"], seg_slots=feed["seg_slots"])
        assert y.tobytes() == wanted.tobytes()
        assert y.tobytes() != graph.run(None, feed)[0].tobytes(), "the graph's own hold sql"


def test_what_is_written(tenants: Path, tmp_path: Path) -> None:
    session = lr.load(tenants, threads=1)
    session.unload_adapter("sql")
    session.export_adapters(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "qkv.onnx_adapter",
        "up.onnx_adapter",
        "words.onnx_adapter",
        "slots.json",
    }
    assert json.loads((tmp_path / "slots.json").read_text()) == {"chat": 2}
    found = ort.AdapterFormat.read_adapter(str(tmp_path / "qkv.onnx_adapter")).get_parameters()
    assert set(found) == {"qkv.lora_A", "qkv.lora_B"}
    half = len(found["qkv.lora_B"].numpy()) // 2
    assert not found["qkv.lora_B"].numpy()[:half].any(), "nothing is left of what was unloaded"
    assert found["qkv.lora_B"].numpy()[half:].any()


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    """The CPU provider multiplies no bfloat16, but it casts: y = float(W)."""
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(ml_dtypes.bfloat16)
    onnx_adapter.write_onnx_adapters(tmp_path, {"cast": {"W": values}}, {"sql": 1})
    zeros = onnx.TensorProto(name="W", data_type=onnx.TensorProto.BFLOAT16, dims=values.shape)
    zeros.raw_data = bytes(values.nbytes)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["W"], ["y"], to=onnx.TensorProto.FLOAT)],
        "cast",
        [onnx.helper.make_tensor_value_info("W", onnx.TensorProto.BFLOAT16, values.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, values.shape)],
        [zeros],
    )
    opsets = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (tmp_path / "graphs").mkdir()
    onnx.save(model, tmp_path / "graphs/cast.onnx")
    cast = open_graph(tmp_path, "cast")
    y = run_file(cast, tmp_path / "cast.onnx_adapter", {})
    assert y.tobytes() == values.astype(np.float32).tobytes()
    assert not cast.run(None, {})[0].any()


def test_with_io_binding_the_parameters_are_bound(tenants: Path, tmp_path: Path) -> None:
    """Where onnxruntime ignores active adapters."""
    session = lr.load(tenants, threads=1)
    session.load_adapter("spare")
    session.export_adapters(tmp_path)
    graph, feed = open_graph(tenants, "up"), feeds("up", "float32")
    file = ort.AdapterFormat.read_adapter(str(tmp_path / "up.onnx_adapter"))
    binding = graph.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    for name, value in file.get_parameters().items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    graph.run_with_iobinding(binding)
    wanted = session["up"].run(
        feed["x"], seg_indptr=feed["seg_indptr"], seg_slots=feed["seg_slots"]
    )
    assert binding.copy_outputs_to_cpu()[0].tobytes() == wanted.tobytes()


def test_a_graph_refuses_the_file_of_another(tenants: Path, tmp_path: Path) -> None:
    """So each graph has its own."""
    lr.load(tenants, threads=1).export_adapters(tmp_path)
    graph = open_graph(tenants, "up")
    with pytest.raises(Exception, match=r"Invalid input name: qkv\.lora_"):
        run_file(graph, tmp_path / "qkv.onnx_adapter", feeds("up", "float32"))


def test_a_service_keeps_the_file_that_it_has_mapped(tenants: Path, tmp_path: Path) -> None:
    session = lr.load(tenants, threads=1)
    session.export_adapters(tmp_path)
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "up.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    graph, feed = open_graph(tenants, "up"), feeds("up", "float32")
    before = graph.run(None, feed, options)[0]
    session.load_adapter("spare")
    session.export_adapters(tmp_path)
    assert graph.run(None, feed, options)[0].tobytes() == before.tobytes()
    after = run_file(graph, tmp_path / "up.onnx_adapter", feed)
    assert after.tobytes() != before.tobytes()


def test_a_failing_export_leaves_the_old_files(
    tenants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = lr.load(tenants, threads=1)
    session.export_adapters(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(source: str, target: Path) -> None:
        raise OSError("no space left")

    session.load_adapter("spare")
    monkeypatch.setattr(onnx_adapter.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        session.export_adapters(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
