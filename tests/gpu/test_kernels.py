"""The library of runtime/kernels in onnxruntime's CUDA provider: values, graphs, lone rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from support.kernels import Graph, assert_right, inputs_of, make_model, random_site

KERNELS = Path(__file__).resolve().parents[2] / "runtime/kernels"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = ["float16", "bfloat16"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled for the device that is there."""
    path = tmp_path_factory.mktemp("kernels") / "library.so"
    major, minor = torch.cuda.get_device_capability()
    subprocess.run(
        [sys.executable, str(KERNELS / "compile_kernels.py"), str(path)],
        env={**os.environ, "LORAEXPORT_KERNELS_ARCHS": f"{major}{minor}"},
        check=True,
    )
    return path


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "per_row"), [(1, 1), (40, 1), (300, 1), (2000, 1), (5, 33)])
def test_values(library: Path, dtype: str, add: bool, rows: int, per_row: int) -> None:
    outs = (96,) if add else (96, 40, 7)
    site = random_site(
        rows,
        dtype=dtype,
        rows=rows,
        per_row=per_row,
        num_slots=9,
        width=24,
        in_features=264,
        outs=outs,
        bias=not add,
        add=add,
    )
    assert_right(site, Graph(site, library, ["cuda"]).run(site))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_stands_alone(library: Path, dtype: str) -> None:
    site = random_site(5, dtype=dtype, rows=64, num_slots=4, in_features=512, outs=(264,))
    site.slots[7] = 2
    graph = Graph(site, library, ["cuda"])
    alone = graph.run(site)[0][7]
    for bad in (np.inf, np.nan, 3.0):
        x, a, b = site.x.copy(), site.a.copy(), site.bs[0].copy()
        x[np.arange(64) != 7] = bad
        a[np.arange(32) // 8 != 1] = b[np.arange(32) // 8 != 1] = bad
        slots = np.random.default_rng(1).integers(0, 5, 64)
        slots[7] = 2
        changed = site.changed(x=x, a=a, bs=[b], slots=slots)
        assert np.array_equal(graph.run(changed)[0][7], alone)


def test_a_captured_graph_sees_new_slots(library: Path) -> None:
    """A replay routes by the slots that are in the buffer, with nothing allocated anew."""
    site = random_site(3, dtype="float16", rows=40, num_slots=6, in_features=512, outs=(512,))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        make_model(site).SerializeToString(),
        options,
        providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})],
    )
    feeds = {name: value.astype(np.float32) for name, value in inputs_of(site).items()}
    feeds["slots"] = site.slots.astype(np.int64)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(feed, "cuda", 0)
        for name, feed in feeds.items()
    }
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([40, 512], np.float32, "cuda", 0)
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("y1", y)
    for slots in (site.slots, np.zeros(40), np.arange(40) % 9, np.full(40, 6)):
        values["slots"].update_inplace(slots.astype(np.int64))
        session.run_with_iobinding(binding)
        assert_right(site.changed(slots=slots.astype(np.int64)), [y.numpy()])
