"""The library of runtime/kernels in onnxruntime's CUDA provider: values, graphs, lone rows."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from support.builds import write_model_project, write_tenants
from support.decoders import FAMILIES, make_prompts, write_decoder
from support.kernels import Graph, assert_right, inputs_of, integers_of, make_model, random_site

import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.checking.check import check_artifact

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
    outs = (96, 40, 8 if add else 7)
    site = random_site(
        rows,
        dtype=dtype,
        rows=rows,
        per_row=per_row,
        num_slots=9,
        width=24,
        ranks=[24, 8, 0, 1, 16, 24, 17, 9, 2],
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
    feeds |= {name: value.astype(np.int64) for name, value in integers_of(site).items()}
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


# Artifacts, with the package as it is installed


@pytest.fixture
def installed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copytree(KERNELS / "loraexport_kernels", tmp_path / "site/loraexport_kernels")
    shutil.copyfile(library, tmp_path / "site/loraexport_kernels/libloraexport_kernels.so")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("loraexport_kernels", None)


@pytest.mark.parametrize("strategy", ["masked", "augmented"])
@pytest.mark.parametrize("write", [write_tenants, write_model_project, write_decoder])
def test_artifacts(
    write: Callable[..., Path], strategy: str, installed: None, tmp_path: Path
) -> None:
    """Both ways are proven; captured sizes and steps give what plain ones give."""
    export = {"dtype": "float16", "kernels": True, "formats": ["onnx"], "strategy": strategy}
    changes: dict[str, Any] = {"export": export}
    if write is write_decoder:
        changes["parity"] = {"tolerance": 0.05}
    arguments = (FAMILIES["Llama"],) if write is write_decoder else ()
    artifact, _ = build(write(tmp_path, *arguments, **changes), tmp_path / "out")
    report = check_artifact(artifact, ["cuda"])
    assert not report.failures
    assert {row.implementation for row in report.rows} >= {"onnx-cuda", "onnx-cuda-kernels"}
    if write is write_decoder:
        opened = [
            lr.load_generator(artifact, ["cuda"], cuda_graphs=captured, kernels=True, rows=4)
            for captured in (True, False)
        ]
        runner: Any = opened[1].engine._worker._runner
        runner.step_rows = opened[0].engine._worker._runner.step_rows
        names = ["first", None, "second"]
        tokens = [one.greedy(make_prompts(5, 9, 7), names, 12) for one in opened]
        assert np.array_equal(tokens[0], tokens[1])
        assert opened[0].engine.stats().kernels.startswith("loraexport-kernels")
