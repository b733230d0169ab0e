"""The runtime on the CPU provider, held to plain numpy: y = W x + b + s B A x, token by token."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file
from support.adapters import write_adapter
from support.builds import write_tenants
from support.manifests import edit_manifest, write_manifest

import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.ort_session import require_device
from loraexport_runtime.device.providers import CPU, CUDA, normalise_providers, session_device

STRATEGIES = ("segmented", "masked", "augmented", "chunked")
SITES = {"qkv": ("blocks.0.q", "blocks.0.k", "blocks.0.v"), "up": ("blocks.0.up",)}
ADAPTERS = {"sql": ("sql", 8 / 4), "chat": ("chat", 0.5 * 8 / np.sqrt(8)), "spare": ("spare", 1.5)}
"""Name -> folder and scaling (alpha / rank, or alpha / sqrt(rank), times the spec's scale)."""

Parts = Sequence[tuple[str | None, int]]


@pytest.fixture
def session(tenants: Path) -> lr.LayersSession:
    """A fresh session with `sql` in slot 1 and `chat` in slot 2, both slots taken."""
    return lr.load(tenants, threads=1)


@pytest.fixture(scope="module")
def by_strategy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(strategy, dtype) -> an artifact of the fused layer with one free slot, built on demand."""
    built: dict[tuple[str, str], Path] = {}

    def artifact(strategy: str, dtype: str) -> Path:
        if (strategy, dtype) not in built:
            folder = tmp_path_factory.mktemp(f"{strategy}-{dtype}")
            spec = write_tenants(
                folder,
                base={
                    "kind": "layers",
                    "path": "base",
                    "layers": [
                        {
                            "name": "qkv",
                            "type": "linear",
                            "slices": [{"name": one[-1], "site": one} for one in SITES["qkv"]],
                        }
                    ],
                },
                adapters=[
                    {"name": "q", "path": "q"},
                    {"name": "chat", "path": "chat", "scale": 0.5},
                ],
                slots=3,
                export={"formats": ["onnx"], "strategy": strategy, "dtype": dtype},
            )
            write_adapter(folder / "q", {"blocks.0.q": (32, 32)}, rank=4, seed=5)
            torch.set_num_threads(1)
            built[strategy, dtype] = build(spec, folder / "artifacts")[0]
        return built[strategy, dtype]

    return artifact


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A PEFT directory on q, v and up, which no artifact knows: rank 3, alpha 6."""
    sites = {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)}
    return write_adapter(tmp_path / "fresh", sites, rank=3, alpha=6, seed=9)


def project_of(artifact: Path) -> Path:
    return artifact.parent.parent


def draw(layer: str, num_tokens: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if layer == "words":
        return generator.integers(0, 40, num_tokens)
    return generator.standard_normal((num_tokens, 32)).astype(np.float32)


def lora_term(x: np.ndarray, folder: Path, site: str, scaling: float) -> np.ndarray | float:
    """s B A x of one site, in float64; 0 where the adapter has none."""
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = f"base_model.model.{site}.lora_"
    if stem + "embedding_A" in tensors:
        a, b = tensors[stem + "embedding_A"], tensors[stem + "embedding_B"]
        return scaling * (a.T[x].astype(np.float64) @ b.T)
    if stem + "A.weight" not in tensors:
        return 0.0
    a, b = tensors[stem + "A.weight"], tensors[stem + "B.weight"]
    return scaling * (x.astype(np.float64) @ a.T @ b.T)


def expected(
    project: Path,
    layer: str,
    x: np.ndarray,
    segments: Parts,
    others: dict[str, tuple[Path, float]] | None = None,
) -> np.ndarray:
    """The layer's output in float64; `others` adds adapters or replaces them, as in ADAPTERS."""
    known = {name: (project / folder, s) for name, (folder, s) in ADAPTERS.items()}
    known |= others or {}
    base = load_file(project / "base/model.safetensors")
    starts = np.cumsum([0] + [length for _, length in segments])
    parts = []
    for site in SITES.get(layer, (layer,)):
        weight, bias = base[f"{site}.weight"], base.get(f"{site}.bias")
        if layer == "words":
            y = weight[x].astype(np.float64)
        else:
            y = x.astype(np.float64) @ weight.T + (0 if bias is None else bias)
        for (name, length), start in zip(segments, starts[:-1], strict=True):
            rows = slice(start, start + length)
            if name is not None:
                y[rows] += lora_term(x[rows], known[name][0], site, known[name][1])
        parts.append(y)
    return np.concatenate(parts, axis=1)


def assert_near(y: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    assert y.shape == wanted.shape
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


MIXES: dict[str, Parts] = {
    "mixed": [("chat", 3), (None, 2), ("sql", 6)],
    "repeated": [("sql", 1), ("chat", 2), ("sql", 3), (None, 1), ("chat", 1), ("sql", 1)],
    "empty": [("chat", 0), ("sql", 4), (None, 0), ("chat", 3), ("sql", 0)],
    "one token": [("sql", 1)],
    "base only": [(None, 5)],
    "one of two": [("chat", 7)],
}


class TestRun:
    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("layer", ["qkv", "up"])
    def test_named_segments(
        self, session: lr.LayersSession, tenants: Path, layer: str, mix: str
    ) -> None:
        x = draw(layer, sum(length for _, length in MIXES[mix]))
        y = session[layer].run(x, segments=MIXES[mix])
        assert y.dtype == np.float32
        assert_near(y, expected(project_of(tenants), layer, x, MIXES[mix]))

    def test_raw_segments_are_the_named_ones(self, session: lr.LayersSession) -> None:
        x = draw("qkv", 9)
        named = session["qkv"].run(x, segments=[("chat", 4), ("sql", 0), (None, 3), ("sql", 2)])
        indptr, slots = np.array([0, 4, 4, 7, 9]), np.array([2, 1, 0, 1])
        raw = session["qkv"].run(x, seg_indptr=indptr, seg_slots=slots)
        assert raw.tobytes() == named.tobytes()

    def test_embedding(self, session: lr.LayersSession, tenants: Path) -> None:
        ids, mix = draw("words", 8), [("spare", 3), (None, 2), ("chat", 1), ("spare", 2)]
        session.unload_adapter("sql")
        session.load_adapter("spare")
        y = session["words"].run(ids, segments=mix)
        assert_near(y, expected(project_of(tenants), "words", ids, mix))

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_float16(self, by_strategy: Callable[[str, str], Path], strategy: str) -> None:
        artifact = by_strategy(strategy, "float16")
        x, mix = draw("qkv", 9).astype(np.float16), [("chat", 4), (None, 2), ("q", 3)]
        y = lr.load(artifact, threads=1)["qkv"].run(x, segments=mix)
        assert y.dtype == np.float16
        project = project_of(artifact)
        wanted = expected(project, "qkv", x, mix, {"q": (project / "q", 2.0)})
        assert_near(y, wanted, 4e-3)

    def test_zero_tokens_give_zero_rows(self, session: lr.LayersSession) -> None:
        empty = np.zeros((0, 32), np.float32)
        for segments in ([], [("sql", 0), (None, 0)]):
            y = session["qkv"].run(empty, segments=segments)
            assert (y.shape, y.dtype) == ((0, 64), np.float32)
        raw = session["words"].run(
            np.zeros(0, np.int64), seg_indptr=np.zeros(1, np.int64), seg_slots=np.zeros(0, np.int64)
        )
        assert raw.shape == (0, 32)
        value = session["up"].run(torch.zeros(0, 32), segments=[])
        assert value.shape() == [0, 48]
        with pytest.raises(lr.UnknownAdapterError):
            session["qkv"].run(empty, segments=[("nobody", 0)])

    def test_input_need_not_be_contiguous_or_writable(
        self, session: lr.LayersSession, tenants: Path
    ) -> None:
        wide = np.random.default_rng(0).standard_normal((32, 12)).astype(np.float32)
        x = wide.T[::2]
        x.flags.writeable = False
        y = session["up"].run(x, segments=[("sql", 6)])
        assert_near(y, expected(project_of(tenants), "up", x, [("sql", 6)]))

    def test_segments_may_be_any_iterable(self, session: lr.LayersSession) -> None:
        x = draw("up", 5)
        y = session["up"].run(x, segments=[("sql", 3), (None, 2)])
        pairs = iter([["sql", np.int32(3)], [None, 2]])
        assert session["up"].run(x, segments=pairs).tobytes() == y.tobytes()

    def test_a_run_leaves_its_input_alone(self, session: lr.LayersSession) -> None:
        x = draw("qkv", 4)
        kept = x.copy()
        first = session["qkv"].run(x, segments=[("sql", 4)])
        second = session["qkv"].run(x, segments=[("sql", 4)])
        assert x.tobytes() == kept.tobytes()
        assert first.tobytes() == second.tobytes()
        assert not np.shares_memory(first, second)

    def test_layers_are_found_by_name(self, session: lr.LayersSession) -> None:
        assert list(session) == ["qkv", "up", "words"]
        assert len(session) == 3
        assert "qkv" in session
        with pytest.raises(KeyError, match="no layer 'down' in this artifact; it has qkv, up"):
            session["down"]


class TestDeviceTensors:
    def test_torch_in_ort_value_out(self, session: lr.LayersSession) -> None:
        x = draw("qkv", 6)
        segments = [("sql", 2), ("chat", 4)]
        value = session["qkv"].run(torch.from_numpy(x), segments=segments)
        assert isinstance(value, ort.OrtValue)
        y = torch.from_dlpack(value)
        assert y.numpy().tobytes() == session["qkv"].run(x, segments=segments).tobytes()

    def test_the_input_is_not_copied(
        self, session: lr.LayersSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound: list[int] = []
        bind = ort.IOBinding.bind_ortvalue_input

        def spy(binding: ort.IOBinding, name: str, value: ort.OrtValue) -> None:
            if name == "x":  # the others are the segments, which are the session's own
                bound.append(value.data_ptr())
            bind(binding, name, value)

        monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", spy)
        x = torch.randn(3, 32)
        session["up"].run(x, segments=[("sql", 3)])
        assert bound == [x.data_ptr()]
        array = x.numpy()
        session["up"].run(array, segments=[("sql", 3)])
        assert bound == [x.data_ptr(), array.ctypes.data]

    def test_an_output_feeds_the_next_layer(self, session: lr.LayersSession) -> None:
        ids = draw("words", 4)
        value = session["words"].run(torch.from_numpy(ids), segments=[(None, 4)])
        y = session["up"].run(value, segments=[("sql", 4)])
        host = session["words"].run(ids, segments=[(None, 4)])
        again = session["up"].run(host, segments=[("sql", 4)])
        assert y.numpy().tobytes() == again.tobytes()

    def test_a_strided_tensor_is_refused(self, session: lr.LayersSession) -> None:
        with pytest.raises(lr.InputError, match="contiguous tensor that requires no gradient"):
            session["up"].run(torch.randn(32, 4).T, segments=[("sql", 4)])

    def test_a_tensor_with_gradient_is_refused(self, session: lr.LayersSession) -> None:
        x = torch.randn(4, 32, requires_grad=True)
        with pytest.raises(lr.InputError, match="contiguous tensor that requires no gradient"):
            session["up"].run(x, segments=[("sql", 4)])

    def test_ids_out_of_range_in_a_tensor(self, session: lr.LayersSession) -> None:
        with pytest.raises(
            lr.InputError, match="ids range from 0 to 40, the first wrong one at token 1;"
        ):
            session["words"].run(torch.tensor([0, 40]), segments=[(None, 2)])

    def test_another_device_is_refused(self, session: lr.LayersSession) -> None:
        class OnCuda:
            """What a CUDA tensor tells before any of its memory is touched."""

            shape, dtype = (2, 32), "float32"

            def __dlpack_device__(self) -> tuple[int, int]:
                return (2, 0)

            def __dlpack__(self) -> None:
                raise AssertionError("its memory must not be asked for")

        with pytest.raises(lr.InputError, match="x is on cuda:0, the session runs on cpu:0; move"):
            session["up"].run(OnCuda(), segments=[("sql", 2)])


class TestPlainOnnxruntime:
    """The graphs are whole without the runtime."""

    def feeds(self, x: np.ndarray) -> dict[str, np.ndarray]:
        indptr, slots = np.array([0, 2, 5, 7]), np.array([1, 0, 2])
        return {"x": x, "seg_indptr": indptr, "seg_slots": slots}

    def plain(self, artifact: Path, layer: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        path = artifact / str(layer_of(artifact, layer).onnx)
        return ort.InferenceSession(path, options, providers=[CPU])

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_without_feeds(self, by_strategy: Callable[[str, str], Path], strategy: str) -> None:
        artifact = by_strategy(strategy, "float32")
        x = draw("qkv", 7)
        (y,) = self.plain(artifact, "qkv").run(None, self.feeds(x))
        wanted = lr.load(artifact, threads=1)["qkv"].run(
            x, segments=[("q", 2), (None, 3), ("chat", 2)]
        )
        assert_near(y, wanted.astype(np.float64), 1e-6)

    def test_with_a_stack_of_its_own(self, tenants: Path) -> None:
        layer = layer_of(tenants, "up")
        plain, x = self.plain(tenants, "up"), draw("up", 7)
        zeros = {stack.name: np.zeros(stack.shape, np.float32) for stack in layer.stacks}
        (y,) = plain.run(None, self.feeds(x) | zeros)
        assert_near(y, expected(project_of(tenants), "up", x, [(None, 7)]))
        doubled = {}
        for stack in layer.stacks:
            doubled[stack.name] = np.zeros(stack.shape, np.float32)
            tensors = load_file(project_of(tenants) / "sql/adapter_model.safetensors")
            factor = tensors[f"base_model.model.blocks.0.up.{stack.role}.weight"]
            block = factor if stack.role == "lora_A" else 2 * 2.0 * factor.T
            start = stack.rows(2).start
            doubled[stack.name][start : start + 4] = block
        (y,) = plain.run(None, self.feeds(x) | doubled)
        twice = {"sql": (project_of(tenants) / "sql", 2 * 2.0)}
        wanted = expected(project_of(tenants), "up", x, [(None, 5), ("sql", 2)], twice)
        assert_near(y, wanted)


def layer_of(artifact: Path, name: str) -> Any:
    return next(layer for layer in Manifest.read(artifact).layers if layer.name == name)


class TestRowIndependence:
    """A row's bytes do not depend on the other rows' adapters, nor on their weights."""

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_other_rows_change_adapter(
        self, by_strategy: Callable[[str, str], Path], strategy: str, dtype: str
    ) -> None:
        layer = lr.load(by_strategy(strategy, dtype), threads=1)["qkv"]
        x = draw("qkv", 75).astype(dtype)
        seen = set()
        for other in ("chat", "q", None):
            y = layer.run(x, segments=[(other, 2), ("q", 70), (other, 3)])
            seen.add(y[2:72].tobytes())
        assert len(seen) == 1

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_another_tenant_overflows(
        self,
        by_strategy: Callable[[str, str], Path],
        tmp_path: Path,
        strategy: str,
        dtype: str,
    ) -> None:
        # The CPU provider keeps x A^T of float16 in float32, so float32 is the case that overflows
        # there as well; test_gpu.py has float16 on CUDA.
        session = lr.load(by_strategy(strategy, dtype), threads=1)
        x = draw("qkv", 12).astype(dtype)
        mix: Parts = [("chat", 4), ("huge", 3), ("q", 3), (None, 2)]
        write_adapter(tmp_path / "small", {"blocks.0.q": (32, 32)}, rank=8, seed=4)
        session.load_adapter("huge", tmp_path / "small")
        before = session["qkv"].run(x, segments=mix)

        session.load_adapter("huge", write_huge(tmp_path / "huge", dtype))
        after = session["qkv"].run(x, segments=mix)
        assert not np.isfinite(after[4:7]).all(), "the test means to overflow"
        others = [0, 1, 2, 3, 7, 8, 9, 10, 11]
        assert np.isfinite(after[others]).all()
        assert after[others].tobytes() == before[others].tobytes()


def write_huge(folder: Path, dtype: str) -> Path:
    """An adapter whose A is finite in `dtype`, while x A^T is not."""
    large = 60000.0 if dtype == "float16" else 3e38
    signs = np.where(np.random.default_rng(0).random((8, 32)) < 0.5, -1, 1)
    tensors = {
        "base_model.model.blocks.0.q.lora_A.weight": (large * signs).astype(np.float32),
    }
    return write_adapter(folder, {"blocks.0.q": (32, 32)}, rank=8, seed=4, tensors=tensors)


class TestHotAdapters:
    def test_load_into_a_free_slot(
        self, session: lr.LayersSession, tenants: Path, fresh: Path
    ) -> None:
        x = draw("qkv", 8)
        mix: Parts = [("chat", 3), (None, 2), ("sql", 3)]
        before = session["qkv"].run(x, segments=mix)
        session.unload_adapter("sql")
        assert session.adapters == {"chat": 2}
        assert session.load_adapter("fresh", fresh) == 1
        assert session.adapters == {"chat": 2, "fresh": 1}
        renamed = [("chat", 3), (None, 2), ("fresh", 3)]
        after = session["qkv"].run(x, segments=renamed)
        assert after[:5].tobytes() == before[:5].tobytes()
        project = project_of(tenants)
        assert_near(after, expected(project, "qkv", x, renamed, {"fresh": (fresh, 6 / 3)}))
        up = session["up"].run(x, segments=renamed)
        assert_near(up, expected(project, "up", x, renamed, {"fresh": (fresh, 6 / 3)}))

    def test_replace_in_place(self, session: lr.LayersSession, tenants: Path, fresh: Path) -> None:
        x = draw("qkv", 8)
        mix: Parts = [("chat", 3), (None, 2), ("sql", 3)]
        before = session["qkv"].run(x, segments=mix)
        assert session.load_adapter("sql", fresh) == 1
        assert session.adapters == {"sql": 1, "chat": 2}
        after = session["qkv"].run(x, segments=mix)
        assert after[:5].tobytes() == before[:5].tobytes()
        project = project_of(tenants)
        assert_near(after, expected(project, "qkv", x, mix, {"sql": (fresh, 6 / 3)}))

    def test_replace_clears_sites_that_the_new_one_leaves_alone(
        self, session: lr.LayersSession, tenants: Path, tmp_path: Path
    ) -> None:
        only_q = write_adapter(tmp_path / "q", {"blocks.0.q": (32, 32)}, rank=1)
        session.load_adapter("sql", only_q)
        x = draw("up", 4)
        y = session["up"].run(x, segments=[("sql", 4)])
        assert_near(y, expected(project_of(tenants), "up", x, [(None, 4)]))

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_load_on_every_strategy(
        self, by_strategy: Callable[[str, str], Path], strategy: str, tmp_path: Path
    ) -> None:
        artifact = by_strategy(strategy, "float32")
        sites = {"blocks.0.k": (32, 16), "blocks.0.v": (32, 16)}
        folder = write_adapter(tmp_path / "kv", sites, rank=5, alpha=10, seed=7)
        session = lr.load(artifact, threads=1)
        x, mix = draw("qkv", 10), [("chat", 3), ("kv", 4), ("q", 3)]
        with pytest.raises(lr.UnknownAdapterError):
            session["qkv"].run(x, segments=mix)
        assert session.load_adapter("kv", folder) == 3
        others = {"kv": (folder, 2.0), "q": (project_of(artifact) / "q", 2.0)}
        y = session["qkv"].run(x, segments=mix)
        assert_near(y, expected(project_of(artifact), "qkv", x, mix, others))

    def test_scale(self, session: lr.LayersSession, tenants: Path, fresh: Path) -> None:
        x, mix = draw("up", 4), [("sql", 4)]
        session.load_adapter("sql", fresh, scale=-0.25)
        y = session["up"].run(x, segments=mix)
        wanted = expected(project_of(tenants), "up", x, mix, {"sql": (fresh, -0.25 * 6 / 3)})
        assert_near(y, wanted)

    def test_load_what_the_artifact_carries(self, session: lr.LayersSession, tenants: Path) -> None:
        session.unload_adapter("chat")
        assert session.load_adapter("spare") == 2
        x, mix = draw("up", 5), [("spare", 3), ("sql", 2)]
        y = session["up"].run(x, segments=mix)
        assert_near(y, expected(project_of(tenants), "up", x, mix))

    def test_scale_multiplies_the_scale_of_the_spec(
        self, session: lr.LayersSession, tenants: Path
    ) -> None:
        session.load_adapter("chat", scale=3)
        x, mix = draw("qkv", 3), [("chat", 3)]
        y = session["qkv"].run(x, segments=mix)
        three = {"chat": (project_of(tenants) / "chat", 3 * 0.5 * 8 / np.sqrt(8))}
        assert_near(y, expected(project_of(tenants), "qkv", x, mix, three))

    def test_sessions_do_not_share_slots(self, tenants: Path, fresh: Path) -> None:
        first, second = (lr.load(tenants, threads=1) for _ in range(2))
        x = draw("up", 3)
        before = second["up"].run(x, segments=[("sql", 3)])
        first.load_adapter("sql", fresh)
        assert second["up"].run(x, segments=[("sql", 3)]).tobytes() == before.tobytes()

    def test_no_free_slot(self, session: lr.LayersSession, fresh: Path) -> None:
        session.pin("sql")
        assert session.load_adapter("fresh", fresh) == 2, "chat is paged out"
        assert session.adapters == {"sql": 1, "fresh": 2}
        session.pin("fresh")
        text = (
            "no slot can be freed for 'new': all 2 are kept for pinned adapters; unpin or"
            " unload one of those, or build with more slots"
        )
        with pytest.raises(lr.SlotsExceededError, match=text):
            session.load_adapter("new", fresh)
        assert session.adapters == {"sql": 1, "fresh": 2}
        assert set(session.list_adapters()) == {"sql", "chat", "spare", "fresh"}

    def test_a_name_that_nothing_carries(self, session: lr.LayersSession) -> None:
        text = r"carries no adapter 'new' among its 3; give the path of a PEFT"
        with pytest.raises(lr.AdapterError, match=text):
            session.load_adapter("new")

    @pytest.mark.parametrize("name", ["", None, 3])
    def test_no_name(self, session: lr.LayersSession, fresh: Path, name: Any) -> None:
        with pytest.raises(lr.AdapterError, match=f"expected a name for the adapter, got {name!r}"):
            session.load_adapter(name, fresh)

    def test_unload_what_is_not_loaded(self, session: lr.LayersSession) -> None:
        session.unload_adapter("spare")
        text = r"adapter 'spare' is not loaded; 2 are, 2 of them in slots: see list_adapters\(\)$"
        with pytest.raises(lr.UnknownAdapterError, match=text):
            session.unload_adapter("spare")

    def test_carried_adapter_changed_after_load(self, tenants: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tenants, copy)
        session = lr.load(copy, threads=1)
        config = copy / "adapters/spare/adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 4'))
        session.unload_adapter("sql")
        with pytest.raises(lr.ArtifactError, match=r"spare: its digest differs .* open it again"):
            session.load_adapter("spare")


BAD_ADAPTERS: dict[str, tuple[dict[str, Any], type[lr.AdapterError], str]] = {
    "fits no site": (
        {"sites": {"blocks.1.q": (32, 32)}},
        lr.AdapterWeightsError,
        "1 of 1 modules have no site in this base, first 'blocks.1.q'. Sites here: ",
    ),
    "another width": (
        {"sites": {"blocks.0.q": (64, 32)}},
        lr.AdapterWeightsError,
        "module 'blocks.0.q' maps 64 to 32 features, but site 'blocks.0.q' maps 32 to 32; the"
        " adapter belongs to another base",
    ),
    "linear for an embedding": (
        {"sites": {"words": (40, 32)}},
        lr.AdapterWeightsError,
        "module 'words' is a linear LoRA, but layer 'words' is of kind embedding",
    ),
    "rank too high": (
        {"sites": {"blocks.0.q": (32, 32)}, "rank": 9},
        lr.AdapterWeightsError,
        "module 'blocks.0.q' has rank 9, above max_rank 8; set max_rank: 9 in the spec and build",
    ),
    "unknown field": (
        {"sites": {"blocks.0.q": (32, 32)}, "config": {"use_magic": True}},
        lr.AdapterConfigError,
        "unknown field 'use_magic' = True",
    ),
}


class TestBadAdapters:
    """Each is refused, and the weights that were loaded before still answer."""

    @pytest.mark.parametrize("case", BAD_ADAPTERS)
    def test_refused(self, session: lr.LayersSession, tmp_path: Path, case: str) -> None:
        options, kind, text = BAD_ADAPTERS[case]
        folder = write_adapter(tmp_path / "bad", **options)
        self.refuse(session, folder, kind, re.escape(text))

    def test_not_a_number(self, session: lr.LayersSession, tmp_path: Path) -> None:
        nan = {"base_model.model.blocks.0.q.lora_B.weight": np.full((32, 4), np.nan, np.float32)}
        folder = write_adapter(tmp_path / "bad", {"blocks.0.q": (32, 32)}, tensors=nan)
        self.refuse(session, folder, lr.WeightsError, "128 of 128 values are NaN or Inf")

    def test_no_such_folder(self, session: lr.LayersSession, tmp_path: Path) -> None:
        self.refuse(session, tmp_path / "none", lr.AdapterConfigError, "no such file; a PEFT adap")

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e300])
    def test_scale_is_not_finite(
        self, session: lr.LayersSession, fresh: Path, scale: float
    ) -> None:
        x = draw("qkv", 4)
        before = session["qkv"].run(x, segments=[("sql", 4)])
        with pytest.raises(lr.AdapterWeightsError, match="lora_B overflows float32"):
            session.load_adapter("sql", fresh, scale=scale)
        assert session["qkv"].run(x, segments=[("sql", 4)]).tobytes() == before.tobytes()

    def test_scale_is_no_number(self, session: lr.LayersSession, fresh: Path) -> None:
        scale: Any = "2"
        with pytest.raises(lr.AdapterError, match="scale is '2'; expected a finite number"):
            session.load_adapter("sql", fresh, scale=scale)

    def test_overflow_in_float16(
        self, by_strategy: Callable[[str, str], Path], tmp_path: Path
    ) -> None:
        layer = lr.load(by_strategy("masked", "float16"), threads=1)
        large = {"base_model.model.blocks.0.q.lora_B.weight": np.full((32, 4), 4e4, np.float32)}
        folder = write_adapter(tmp_path / "bad", {"blocks.0.q": (32, 32)}, tensors=large)
        x = draw("qkv", 4).astype(np.float16)
        before = layer["qkv"].run(x, segments=[("q", 4)])
        text = "layer 'qkv': lora_B overflows float16; export in bfloat16 or float32, or lower the"
        with pytest.raises(lr.AdapterWeightsError, match=text):
            layer.load_adapter("q", folder)
        assert layer["qkv"].run(x, segments=[("q", 4)]).tobytes() == before.tobytes()

    def refuse(
        self, session: lr.LayersSession, folder: Path, kind: type[Exception], text: str
    ) -> None:
        x = draw("qkv", 4)
        before = session["qkv"].run(x, segments=[("sql", 4)])
        with pytest.raises(kind, match=text):
            session.load_adapter("sql", folder)
        assert session.adapters == {"sql": 1, "chat": 2}
        assert session["qkv"].run(x, segments=[("sql", 4)]).tobytes() == before.tobytes()


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


BAD_SEGMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "not at 0": (
        {"seg_indptr": ints(1, 5), "seg_slots": ints(1)},
        "seg_indptr starts at 1; expected 0",
    ),
    "falls": (
        {"seg_indptr": ints(0, 4, 3, 5), "seg_slots": ints(1, 2, 0)},
        "seg_indptr falls from 4 at entry 1 to 3 at entry 2; expected offsets that never fall",
    ),
    "falls by more than int64 holds": (
        {"seg_indptr": ints(0, 2**63 - 1, -(2**63), 5), "seg_slots": ints(1, 2, 0)},
        "seg_indptr falls from 9223372036854775807 at entry 1 to -9223372036854775808",
    ),
    "too short": (
        {"seg_indptr": ints(0, 4), "seg_slots": ints(1)},
        "the segments cover 4 tokens, but the input has 5; make their lengths sum to",
    ),
    "too long": (
        {"seg_indptr": ints(0, 6), "seg_slots": ints(1)},
        "the segments cover 6 tokens, but the input has 5",
    ),
    "no segment": (
        {"seg_indptr": ints(0), "seg_slots": ints()},
        "the segments cover 0 tokens, but the input has 5",
    ),
    "no entry": (
        {"seg_indptr": ints(), "seg_slots": ints()},
        "seg_indptr has 0 entries for the 0 segments of seg_slots; expected one entry more",
    ),
    "lengths differ": (
        {"seg_indptr": ints(0, 2, 5), "seg_slots": ints(1)},
        "seg_indptr has 3 entries for the 1 segments of seg_slots; expected one entry more",
    ),
    "int32": (
        {"seg_indptr": ints(0, 5).astype(np.int32), "seg_slots": ints(1)},
        "seg_indptr is int32 with shape [2]; expected int64 with one dimension",
    ),
    "float slots": (
        {"seg_indptr": ints(0, 5), "seg_slots": np.array([1.0])},
        "seg_slots is float64 with shape [1]; expected int64 with one dimension",
    ),
    "two dimensions": (
        {"seg_indptr": ints(0, 5), "seg_slots": ints(1).reshape(1, 1)},
        "seg_slots is int64 with shape [1, 1]; expected int64 with one dimension",
    ),
    "lists": (
        {"seg_indptr": [0, 5], "seg_slots": [1]},
        "seg_indptr is of type list; expected a numpy array, int64 with one dimension",
    ),
    "torch": (
        {"seg_indptr": ints(0, 5), "seg_slots": torch.tensor([1])},
        "seg_slots is of type Tensor; expected a numpy array, int64 with one dimension",
    ),
    "negative slot": (
        {"seg_indptr": ints(0, 5), "seg_slots": ints(-1)},
        "seg_slots: slot -1 is out of range; this artifact has slots 0 (the base) to 2",
    ),
    "slot too large": (
        {"seg_indptr": ints(0, 1, 5), "seg_slots": ints(2, 3)},
        "seg_slots: slot 3 is out of range; this artifact has slots 0 (the base) to 2",
    ),
    "one of the two": (
        {"seg_indptr": ints(0, 5)},
        "give either segments, or seg_indptr and seg_slots together",
    ),
    "both forms": (
        {"segments": [("sql", 5)], "seg_indptr": ints(0, 5), "seg_slots": ints(1)},
        "give either segments, or seg_indptr and seg_slots together",
    ),
    "nothing": ({}, "give either segments, or seg_indptr and seg_slots together"),
    "named too short": (
        {"segments": [("sql", 2), (None, 2)]},
        "the segments cover 4 tokens, but the input has 5",
    ),
    "named too long": (
        {"segments": [("sql", 2**70)]},
        f"the segments cover {2**70} tokens, but the input has 5",
    ),
    "negative length": (
        {"segments": [("sql", 6), ("chat", -1)]},
        "segments[1] is ('chat', -1); expected a pair: an adapter's name, or None for the base,",
    ),
    "float length": ({"segments": [("sql", 5.0)]}, "segments[0] is ('sql', 5.0); expected a pair"),
    "bool length": ({"segments": [("sql", True)]}, "segments[0] is ('sql', True); expected a pair"),
    "names only": ({"segments": ["sql"]}, "segments[0] is 'sql'; expected a pair"),
    "slot for a name": ({"segments": [(1, 5)]}, "segments[0] is (1, 5); expected a pair"),
    "no list": (
        {"segments": 5},
        "segments: expected a list of (adapter name or None, number of tokens), got 5",
    ),
}


class TestBadBatches:
    @pytest.mark.parametrize("case", BAD_SEGMENTS)
    def test_segments(self, session: lr.LayersSession, case: str) -> None:
        options, text = BAD_SEGMENTS[case]
        with pytest.raises(lr.SegmentsError, match=re.escape(text)):
            session["up"].run(draw("up", 5), **options)
        assert session["up"].run(draw("up", 5), segments=[("sql", 5)]).shape == (5, 48)

    def test_slot_that_holds_no_adapter(self, session: lr.LayersSession) -> None:
        session.unload_adapter("chat")
        text = (
            r"slot 2 holds no adapter: see list_adapters\(\); 1 of 2 do. Load one,"
            " or name adapters"
        )
        with pytest.raises(lr.SegmentsError, match=text):
            session["up"].run(draw("up", 2), seg_indptr=ints(0, 2), seg_slots=ints(2))

    @pytest.mark.parametrize("name", ["nobody", "spare"])
    def test_adapter_that_is_not_loaded(self, session: lr.LayersSession, name: str) -> None:
        session.unload_adapter("spare")
        text = (
            rf"adapter '{name}' is not loaded; [23] are, 2 of them in slots: see list_adapters\(\)."
            rf" Load it with load_adapter\('{name}'\)"
        )
        with pytest.raises(lr.UnknownAdapterError, match=text):
            session["up"].run(draw("up", 2), segments=[("sql", 1), (name, 1)])

    def test_no_adapter_is_loaded(self, session: lr.LayersSession) -> None:
        for name in ("sql", "chat", "spare"):
            session.unload_adapter(name)
        with pytest.raises(lr.UnknownAdapterError, match=r"0 are, 0 of them in .*\. Load it"):
            session["up"].run(draw("up", 2), segments=[("sql", 2)])
        assert session["up"].run(draw("up", 2), segments=[(None, 2)]).shape == (2, 48)

    def test_more_adapters_than_slots(self, session: lr.LayersSession) -> None:
        mix = [("sql", 1), ("chat", 1), ("spare", 1)]
        text = "the batch names 3 adapters, but there are 2 slots; split the batch, or build with"
        with pytest.raises(lr.SlotsExceededError, match=text):
            session["up"].run(draw("up", 3), segments=mix)

    @pytest.mark.parametrize(
        ("x", "text"),
        [
            (np.zeros((2, 32)), "layer 'up': x is float64; this artifact takes float32, so cast"),
            (np.zeros((2, 32), np.float16), "x is float16; this artifact takes float32"),
            (np.zeros((2, 32), np.int64), "x is int64; this artifact takes float32"),
            (np.zeros((2, 32), ">f4"), "x is >f4; this artifact takes float32"),
            (torch.zeros(2, 32, dtype=torch.bfloat16), "x is bfloat16; this artifact takes"),
            (np.zeros((2, 31), np.float32), "x has shape [2, 31]; expected [num_tokens, 32]"),
            (np.zeros(32, np.float32), "x has shape [32]; expected [num_tokens, 32]"),
            (np.zeros((1, 2, 32), np.float32), "x has shape [1, 2, 32]; expected [num_tokens, 32]"),
            ([[0.0] * 32] * 2, "layer 'up': x is of type list; expected a numpy array or a DLPack"),
            (None, "x is of type NoneType; expected a numpy array or a DLPack tensor"),
        ],
    )
    def test_input(self, session: lr.LayersSession, x: Any, text: str) -> None:
        with pytest.raises(lr.InputError, match=re.escape(text)):
            session["up"].run(x, segments=[("sql", 2)])

    def test_ort_value_of_another_dtype(self, session: lr.LayersSession) -> None:
        value = ort.OrtValue.ortvalue_from_numpy(np.zeros((2, 32), np.float16))
        with pytest.raises(lr.InputError, match=r"x is float16; this artifact"):
            session["up"].run(value, segments=[("sql", 2)])

    @pytest.mark.parametrize(
        ("ids", "text"),
        [
            (
                ints(0, 40),
                "layer 'words': ids range from 0 to 40, the first wrong one at token 1; ex",
            ),
            (
                ints(-1, 3),
                "ids range from -1 to 3, the first wrong one at token 0; expected 0 to 39",
            ),
            (np.zeros(2, np.int32), "ids is int32; this artifact takes int64"),
            (np.zeros((2, 1), np.int64), "ids has shape [2, 1]; expected [num_tokens]"),
            ([1, 2], "ids is of type list; expected a numpy array or a DLPack tensor"),
        ],
    )
    def test_ids(self, session: lr.LayersSession, ids: Any, text: str) -> None:
        with pytest.raises(lr.InputError, match=re.escape(text)):
            session["words"].run(ids, segments=[("sql", 2)])

    def test_every_one_is_a_batch_error(self) -> None:
        kinds = (lr.InputError, lr.SegmentsError, lr.SlotsExceededError, lr.UnknownAdapterError)
        assert all(issubclass(kind, lr.BatchError) for kind in kinds)
        assert issubclass(lr.BatchError, lr.LoraexportError)


def has_cuda() -> bool:
    try:
        normalise_providers([CUDA])
        require_device(("cuda", 0))
    except lr.ProviderError:
        return False
    return True


class TestProviders:
    @pytest.mark.skipif(
        CUDA not in ort.get_available_providers() or has_cuda(),
        reason="CUDA works, or is not built",
    )
    @pytest.mark.parametrize("name", ["cuda", CUDA, ("cuda", {"device_id": 0})])
    def test_cuda_without_its_libraries(self, tenants: Path, name: Any, capfd: Any) -> None:
        text = (
            r"CUDAExecutionProvider was asked for but cannot run here: lib\w+\.so\.\d+: .*"
            r"needs CUDA 13 and cuDNN 9\), or pass providers=\['CPUExecutionProvider'\]"
        )
        with pytest.raises(lr.ProviderError, match=text):
            lr.load(tenants, [name])
        assert capfd.readouterr() == ("", ""), "the exception says it all"

    def test_unknown_provider(self, tenants: Path) -> None:
        text = r"WarpProvider is not part of this onnxruntime .* \(it has .*CPUExecutionProvider"
        with pytest.raises(lr.ProviderError, match=text):
            lr.load(tenants, ["WarpProvider"])

    @pytest.mark.parametrize("providers", ["cuda", CPU, [], ()])
    def test_bare_string_or_nothing(self, tenants: Path, providers: Any) -> None:
        text = r"providers: expected a list such as \['CPUExecutionProvider'\], got"
        with pytest.raises(lr.ProviderError, match=text):
            lr.load(tenants, providers)

    @pytest.mark.parametrize("entry", [3, ("cpu",), ("cpu", 1), (None, {}), ["cpu", {}]])
    def test_malformed_entry(self, tenants: Path, entry: Any) -> None:
        with pytest.raises(
            lr.ProviderError, match=r"expected a name, or a tuple \(name, options\)"
        ):
            lr.load(tenants, [entry])

    @pytest.mark.parametrize("device", ["first", None, [0]])
    def test_a_device_that_is_no_number(self, device: Any) -> None:
        with pytest.raises(lr.ProviderError, match=r"device_id is .*; expected a number"):
            session_device((CUDA, {"device_id": device}))

    @pytest.mark.parametrize("threads", [-1, 1.5, "2", True])
    def test_no_number_of_threads(self, tenants: Path, threads: Any) -> None:
        with pytest.raises(lr.InputError, match=r"threads is .*; expected 1 or more, or None"):
            lr.load(tenants, threads=threads)

    def test_short_name_and_options(self, tenants: Path) -> None:
        x = draw("up", 3)
        session = lr.load(tenants, [("cpu", {"arena_extend_strategy": "kSameAsRequested"})])
        assert session["up"].run(x, segments=[(None, 3)]).shape == (3, 48)

    def test_a_graph_that_onnxruntime_refuses(
        self, tenants: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("no kernel for this")

        monkeypatch.setattr(ort, "InferenceSession", refuse)
        text = r"qkv.onnx: onnxruntime .* cannot open this graph on CPUExecution.*no kernel for th"
        with pytest.raises(lr.ProviderError, match=text):
            lr.load(tenants)


def test_an_artifact_swapped_while_it_is_opened_is_opened_again(
    tenants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build may publish between two reads: then the session is the new artifact's, whole."""
    from loraexport_runtime.sessions import load as module

    folder = tmp_path / "artifact"
    shutil.copytree(tenants, folder)
    opened: list[str] = []

    def open_then_swap(path: Path, manifest: Manifest, *rest: Any) -> lr.LayersSession:
        session = make_session(path, manifest, *rest)
        opened.append(manifest.created)
        if len(opened) == 1:
            text = (folder / "manifest.json").read_text()
            newer = text.replace(manifest.created, "2099-01-01T00:00:00+00:00")
            write_manifest(folder, newer)
        return session

    make_session = module.make_session
    monkeypatch.setattr(module, "make_session", open_then_swap)
    session = lr.load(folder, threads=1)
    assert len(opened) == 2
    assert session.manifest.created == opened[1] == "2099-01-01T00:00:00+00:00"


def test_a_layer_without_onnx_says_what_to_ask_for(tenants: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(tenants, folder)
    edit_manifest(folder, lambda data: data["layers"][1].update(onnx=None))
    text = "layer 'up' has no ONNX graph; add onnx to export.formats and build again"
    with pytest.raises(lr.ArtifactError, match=text):
        lr.load(folder)
