"""Property: all four strategies, the seed's loop, TorchScript and ONNX agree with the oracle."""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.adapters import write_adapter
from support.builds import Project
from support.models import write_base

from loraexport.bases.adapters import load_adapters
from loraexport.bases.layers import LayerModules, build_modules, load_layers_base
from loraexport.export.onnx import export_onnx
from loraexport.export.torchscript import export_torchscript
from loraexport.parity.oracle import read_reference_adapter, reference_output
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport.tensors import to_numpy, to_torch
from loraexport_runtime.checking.rows import LAYER_TOLERANCES

STRATEGIES = ("segmented", "masked", "augmented", "chunked")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class Drawn:
    """A random layer with random adapters; which of the sites an adapter has is random too."""

    kind: str
    in_features: int
    widths: list[int]
    has_bias: bool
    num_slots: int
    ranks: list[dict[str, int]]
    alphas: list[float]
    rslora: list[bool]
    dtype: str
    seed: int


@st.composite
def layers(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Drawn:
    kind = draw(st.sampled_from(["linear", "linear", "embedding"]))
    widths = draw(st.lists(st.integers(8, 40), min_size=1, max_size=3))
    if kind == "embedding":
        widths = widths[:1]
    sites = [f"m.s{index}" for index in range(len(widths))]
    num_adapters = draw(st.integers(1, 4))
    some_sites = st.lists(st.sampled_from(sites), min_size=1, unique=True)
    ranks = [
        {site: draw(st.integers(1, 9)) for site in draw(some_sites)} for _ in range(num_adapters)
    ]
    return Drawn(
        kind,
        draw(st.integers(8, 48)),
        widths,
        draw(st.booleans()),
        draw(st.integers(max(1, num_adapters - 1), num_adapters + 2)),
        ranks,
        [draw(st.sampled_from([1, 2.5, 8, 16])) for _ in range(num_adapters)],
        [draw(st.booleans()) for _ in range(num_adapters)],
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 999)),
    )


def segments(num_slots: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Slots repeat, segments may be empty; at least one token in all."""
    lengths = st.integers(0, 9) | st.integers(60, 140)
    one = st.tuples(st.integers(0, num_slots), lengths)
    return st.lists(one, min_size=1, max_size=7).filter(lambda drawn: sum(n for _, n in drawn) > 0)


class Built:
    """The layer's modules for one strategy, and its oracle."""

    def __init__(self, folder: Path, drawn: Drawn, strategy: str) -> None:
        generator = np.random.default_rng(drawn.seed)
        is_embedding = drawn.kind == "embedding"
        tensors, slices = {}, []
        for index, width in enumerate(drawn.widths):
            shape = (drawn.in_features, width) if is_embedding else (width, drawn.in_features)
            weight = generator.standard_normal(shape) / (1 if is_embedding else shape[1] ** 0.5)
            tensors[f"m.s{index}.weight"] = weight.astype(np.float32)
            if drawn.has_bias and not is_embedding:
                bias = generator.standard_normal(width)
                tensors[f"m.s{index}.bias"] = bias.astype(np.float32)
            slices.append({"name": f"s{index}", "site": f"m.s{index}"})
        write_base(folder / "base", tensors)
        adapters = []
        for index, ranks in enumerate(drawn.ranks):
            sites = {
                site: (drawn.in_features, drawn.widths[int(site.removeprefix("m.s"))])
                for site in ranks
            }
            write_adapter(
                folder / f"a{index}",
                sites,
                alpha=drawn.alphas[index],
                seed=drawn.seed + index,
                embeddings=tuple(sites) if is_embedding else (),
                config={"use_rslora": drawn.rslora[index], "rank_pattern": ranks},
            )
            adapters.append({"name": f"a{index}", "path": f"a{index}", "scale": 1 - index / 8})
        layer: dict[str, Any] = {"name": "layer", "type": drawn.kind}
        layer |= {"site": "m.s0"} if is_embedding else {"slices": slices}
        path = Project(folder).spec(
            base={"kind": "layers", "path": "base", "layers": [layer]},
            adapters=adapters,
            slots=drawn.num_slots,
            export={"dtype": drawn.dtype, "strategy": strategy},
        )
        self.plan = make_plan(read_spec(path), folder)
        self.base = load_layers_base(self.plan)
        loaded = load_adapters(self.plan, self.base)
        self.modules: LayerModules = build_modules(self.plan, self.base, loaded)[0]
        site_names = [part.site for part in self.modules.layer.slices]
        self.adapters = {
            one.slot: read_reference_adapter(one.header.path, site_names, one.scale)
            for one in self.plan.adapters
            if one.slot is not None
        }
        self.num_loaded = len(self.adapters)

    def inputs(
        self, drawn: Drawn, chosen: list[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        layer = self.modules.layer
        num_tokens = sum(length for _, length in chosen)
        generator = np.random.default_rng(drawn.seed)
        if layer.kind == "embedding":
            x = generator.integers(0, layer.in_features, num_tokens)
        else:
            x = generator.standard_normal((num_tokens, layer.in_features))
            x = x.astype(self.modules.stacks[layer.stacks[0].name].dtype)
        seg_indptr = np.cumsum([0] + [length for _, length in chosen], dtype=np.int64)
        return x, seg_indptr, np.array([slot for slot, _ in chosen], dtype=np.int64)

    def check(self, y: np.ndarray, x: np.ndarray, indptr: np.ndarray, slots: np.ndarray) -> None:
        weights = [
            (part.site, self.base.sites[part.site].weight, self.base.sites[part.site].bias)
            for part in self.modules.layer.slices
        ]
        token_slots = np.repeat(slots, np.diff(indptr))
        expected = reference_output(x, token_slots, weights, self.adapters)
        base = reference_output(x, np.zeros_like(token_slots), weights, {})
        size = np.abs(expected).max() + np.abs(expected - base).max()
        error = np.abs(y.astype(np.float64) - expected).max() / size
        tolerance = LAYER_TOLERANCES[self.plan.spec.export.dtype].error
        assert error <= tolerance, f"error {error:.2e} is above {tolerance:.0e}"

    def run_stacked(self, *inputs: np.ndarray) -> np.ndarray:
        stacks = [to_torch(self.modules.stacks[one.name]) for one in self.modules.layer.stacks]
        with torch.no_grad():
            return to_numpy(self.modules.stacked(*map(to_torch, inputs), *stacks))

    def run_segmented(self, module: torch.nn.Module, *inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return to_numpy(module(*map(to_torch, inputs)))


def clip_slots(chosen: list[tuple[int, int]], num_loaded: int) -> list[tuple[int, int]]:
    """Slots without an adapter are the runtime's to refuse; here they become the base."""
    return [(slot if slot <= num_loaded else 0, length) for slot, length in chosen]


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data(), drawn=layers())
def test_eager_strategies_and_loop_agree_with_the_oracle(
    strategy: str, data: st.DataObject, drawn: Drawn
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(Path(folder), drawn, strategy)
        for _ in range(3):
            chosen = clip_slots(data.draw(segments(drawn.num_slots)), built.num_loaded)
            inputs = built.inputs(drawn, chosen)
            built.check(built.run_stacked(*inputs), *inputs)
            built.check(built.run_segmented(built.modules.segmented, *inputs), *inputs)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), drawn=layers())
def test_torchscript_agrees_with_the_oracle(data: st.DataObject, drawn: Drawn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(Path(folder), drawn, "segmented")
        path = Path(folder) / "layer.ts"
        export_torchscript(built.modules.layer, built.modules.segmented, drawn.dtype, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            graph = torch.jit.load(str(path))
        for _ in range(4):
            chosen = clip_slots(data.draw(segments(drawn.num_slots)), built.num_loaded)
            inputs = built.inputs(drawn, chosen)
            built.check(built.run_segmented(graph, *inputs), *inputs)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("chunked", "segmented") else [])
        for name in STRATEGIES
    ],
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data(), drawn=layers(("float32", "float16")))  # no bfloat16 MatMul on the CPU
def test_onnx_agrees_with_the_oracle(strategy: str, data: st.DataObject, drawn: Drawn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(Path(folder), drawn, strategy)
        path = Path(folder) / "layer.onnx"
        export_onnx(built.modules, drawn.dtype, path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(12):
            chosen = clip_slots(data.draw(segments(drawn.num_slots)), built.num_loaded)
            inputs = built.inputs(drawn, chosen)
            names = (built.modules.layer.input_name, "seg_indptr", "seg_slots")
            y = session.run(None, dict(zip(names, inputs, strict=True)))[0]
            built.check(y, *inputs)
