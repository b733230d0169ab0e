"""On a CUDA device: no sync in the seed's loop, every strategy and dtype, device buffers, slots."""

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapters import write_adapter
from support.builds import Project, write_model_project, write_vit_project
from support.decoders import FAMILIES, VOCABULARY, write_decoder
from support.models import write_base

from loraexport.bases.adapters import load_adapters
from loraexport.bases.layers import LayerModules, build_modules, load_layers_base
from loraexport.lora.segmented import SegmentedLayer
from loraexport.parity.implementations import open_torchscript
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport.tensors import to_numpy
from loraexport_runtime import (
    ClosedError,
    InputError,
    LayersSession,
    ModelSession,
    ProviderError,
    load,
)
from loraexport_runtime.buckets.bucket import Bucket
from loraexport_runtime.buckets.replays import Replays
from loraexport_runtime.checking.check import check_artifact
from loraexport_runtime.checking.decoder import compare_tokens
from loraexport_runtime.checking.decoder_cases import load_reference
from loraexport_runtime.checking.rows import MODEL_TOLERANCES, stored_tolerance
from loraexport_runtime.device.cuda_libraries import compute_capability, load_cuda_libraries
from loraexport_runtime.device.dtypes import NUMPY_DTYPES
from loraexport_runtime.device.memory import host_value
from loraexport_runtime.generation.load import load_generator
from loraexport_runtime.generation.request import GenerationRequest
from loraexport_runtime.generation.steps import sizes as cache_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    write_base(path / "base")
    sites = {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "words": (40, 32)}
    write_adapter(path / "sql", sites, seed=1, embeddings=("words",))
    write_adapter(path / "chat", {"blocks.0.q": (32, 32)}, seed=2, rank=8)
    write_adapter(path / "legal", {"blocks.0.k": (32, 16), "blocks.0.q": (32, 32)}, seed=3)
    return path


def spec(folder: Path, strategy: str, dtype: str, **changes: Any) -> Path:
    qkv = {
        "name": "qkv",
        "type": "linear",
        "slices": [{"name": part, "site": f"blocks.0.{part}"} for part in ("q", "k", "v")],
    }
    words = {"name": "words", "type": "embedding", "site": "words"}
    return Project(folder).spec(
        name=f"{strategy}-{dtype}",
        base={"kind": "layers", "path": "base", "layers": [qkv, words]},
        export={"strategy": strategy, "dtype": dtype},
        slots=3,
        **changes,
    )


def modules(folder: Path, dtype: str) -> tuple[LayerModules, ...]:
    plan = make_plan(read_spec(spec(folder, "masked", dtype)), folder)
    base = load_layers_base(plan)
    return build_modules(plan, base, load_adapters(plan, base))


SEGMENTS = torch.tensor([0, 3, 3, 20, 21, 40]), torch.tensor([2, 1, 1, 0, 2])


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    """Whatever waits for the device raises."""
    with warnings.catch_warnings():
        # torch says once that this mode may overlook some.
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_loop_makes_no_sync(folder: Path, dtype: str) -> None:
    module: SegmentedLayer = modules(folder, dtype)[0].segmented
    x = torch.randn(40, 32, dtype=getattr(torch, dtype))
    with torch.no_grad():
        expected = module(x, *SEGMENTS)
        on_device, x_device = module.cuda(), x.cuda()
        on_device(x_device, *SEGMENTS)  # cuBLAS sets itself up
        torch.cuda.synchronize()
        with syncs_are_errors():
            y = on_device(x_device, *SEGMENTS)
    error = (y.cpu().float() - expected.float()).abs().max().item()
    assert error <= {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}[dtype]


def test_the_sync_check_can_fail() -> None:
    x = torch.ones(3, device="cuda")
    with syncs_are_errors(), pytest.raises(RuntimeError, match="called a synchronizing"):
        x.sum().item()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("strategy", ["segmented", "masked", "augmented", "chunked"])
def test_every_strategy_and_dtype_passes_parity(folder: Path, strategy: str, dtype: str) -> None:
    artifact, report = build(spec(folder, strategy, dtype), folder / "artifacts")
    assert report.status == "passed"
    ran = {row.implementation for row in report.rows}
    assert {"onnx-cuda", "torchscript-cuda", "eager"} <= ran
    session = load(artifact, ["cuda"])
    check_device_buffers(session, dtype)
    if dtype != "bfloat16":
        check_hot_load(session, load(artifact), folder)


def check_device_buffers(session: LayersSession, dtype: str) -> None:
    """Device tensors in and out without a copy give what numpy in and out gives."""
    x = torch.randn(40, 32, device="cuda", dtype=getattr(torch, dtype))
    segments = [("sql", 7), (None, 3), ("chat", 30)]
    y = session["qkv"].run(x, segments=segments)
    on_device = torch.from_dlpack(y)
    assert on_device.is_cuda
    assert on_device.data_ptr() == y.data_ptr()
    on_host = session["qkv"].run(to_numpy(x), segments=segments)
    assert to_numpy(on_device).tobytes() == on_host.tobytes()
    with pytest.raises(InputError, match="x is on cpu:0, the session runs on cuda:0"):
        session["qkv"].run(x.cpu(), segments=segments)


def check_hot_load(session: LayersSession, on_cpu: LayersSession, folder: Path) -> None:
    """An adapter loaded into a slot in place answers, and other rows stay bit for bit."""
    dtype = np.float16 if session["qkv"].dtype == "float16" else np.float32
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(dtype)
    before = session["qkv"].run(x, segments=[("sql", 10), (None, 10)])
    for one in (session, on_cpu):
        one.load_adapter("legal", folder / "legal")
    after = session["qkv"].run(x, segments=[("sql", 10), ("legal", 10)])
    expected = on_cpu["qkv"].run(x, segments=[("sql", 10), ("legal", 10)])
    assert after[:10].tobytes() == before[:10].tobytes()
    assert np.abs(after[10:] - before[10:]).max() > 0.05
    tolerance = 2e-2 if dtype == np.float16 else 1e-4
    assert np.abs(after.astype(np.float64) - expected).max() <= tolerance
    session.load_adapter("legal", folder / "chat", scale=0.5)  # as the spec has it
    replaced = session["qkv"].run(x, segments=[("sql", 10), ("legal", 10)])
    chat = session["qkv"].run(x, segments=[("sql", 10), ("chat", 10)])
    # Another slot is another place in the products' sums: equal but for rounding.
    assert np.abs(replaced.astype(np.float64) - chat).max() <= tolerance
    session.unload_adapter("legal")


def test_rows_are_independent_bit_for_bit(folder: Path) -> None:
    """Another tenant's A overflows float16: no NaN may reach the other rows."""
    huge = {
        "base_model.model.blocks.0.q.lora_A.weight": np.full((4, 32), 6e4, np.float32),
        "base_model.model.blocks.0.q.lora_B.weight": np.full((32, 4), 1.0, np.float32),
    }
    write_adapter(folder / "huge", {"blocks.0.q": (32, 32)}, tensors=huge)
    adapters = [{"name": name, "path": name} for name in ("sql", "chat")]
    for strategy in ("segmented", "masked", "augmented", "chunked"):
        path = spec(folder, strategy, "float16", adapters=adapters)
        session = load(build(path, folder / "independent")[0], ["cuda"])
        session.load_adapter("huge", folder / "huge")
        x = np.random.default_rng(1).standard_normal((200, 32)).astype(np.float16)
        alone = session["qkv"].run(x, segments=[("sql", 90), (None, 70), (None, 40)])
        mixed = session["qkv"].run(x, segments=[("sql", 90), ("huge", 70), (None, 40)])
        rows = np.r_[0:90, 160:200]
        assert np.isfinite(alone).all()
        assert mixed[rows].tobytes() == alone[rows].tobytes()
        assert not np.isfinite(mixed[90:160]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_whole_model(tmp_path: Path, dtype: str) -> None:
    """Parity on the device, tensors without a copy, and more tenants than slots."""
    export = {"dtype": dtype, "formats": ["torchscript", "onnx"]}
    path = write_model_project(tmp_path, export=export, slots=2)
    artifact, report = build(path, tmp_path / "artifacts")
    assert report.status == "passed"
    ran = {row.implementation for row in report.rows}
    assert {"onnx-cuda", "torchscript-cuda", "eager"} <= ran
    session = load(artifact, ["cuda"])
    assert isinstance(session, ModelSession)
    ids = torch.randint(1, 60, (4, 9))
    values = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    names = ["sql", None, "chat", "sql"]
    on_host = session.run({key: one.numpy() for key, one in values.items()}, names)
    y = session.run({key: one.cuda() for key, one in values.items()}, names)
    on_device = torch.from_dlpack(y["last_hidden_state"])
    assert on_device.is_cuda
    assert to_numpy(on_device).tobytes() == on_host["last_hidden_state"].tobytes()
    session.load_adapter("legal", tmp_path / "legal")
    session.load_adapter("fourth", tmp_path / "sql")
    assert len(session.adapters) == 2
    session.run({key: one.numpy() for key, one in values.items()}, ["legal", "fourth"] * 2)
    paged = session.run({key: one.numpy() for key, one in values.items()}, names)
    difference = np.abs(
        paged["last_hidden_state"].astype(np.float64) - on_host["last_hidden_state"]
    )
    assert difference.max() <= {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}[dtype]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_texts_without_their_padding(tmp_path: Path, dtype: str, device: str) -> None:
    """By onnxruntime's packed attention, and by the one that every provider has."""
    export = {"dtype": dtype, "packed": True, "tune": {"device": device}, "formats": ["onnx"]}
    path = write_model_project(tmp_path, export=export, sites="all-linear")
    artifact, report = build(path, tmp_path / "artifacts")
    ran = {row.implementation for row in report.rows}
    assert report.status == "passed"
    assert ("onnx-cpu" in ran) == ((dtype, device) != ("float16", "cuda"))
    assert "onnx-cuda" in ran
    session = load(artifact, ["cuda"])
    assert isinstance(session, ModelSession)
    mask = np.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    ids = np.random.default_rng(0).integers(2, 40, mask.shape)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    y = session.run(values, ["sql", None, "chat"])["last_hidden_state"].astype(np.float64)
    assert not y[mask == 0].any()
    alone = {name: one[2:, :2] for name, one in values.items()}
    last = session.run(alone, ["chat"])["last_hidden_state"].astype(np.float64)
    assert np.abs(y[2, :2] - last[0]).max() <= {"float32": 1e-4, "float16": 2e-2}[dtype]
    with pytest.raises(ProviderError, match="no CUDA graph can hold that; pass no cuda_graphs"):
        load(artifact, ["cuda"], cuda_graphs=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_in_torchscript_makes_no_sync(tmp_path: Path, dtype: str) -> None:
    export = {"dtype": dtype, "formats": ["torchscript"]}
    artifact, _ = build(write_model_project(tmp_path, export=export), tmp_path / "artifacts")
    graph = open_torchscript(artifact / "graphs/model.ts", "cuda")
    ids = torch.randint(1, 60, (4, 9), device="cuda")
    arguments = (ids, torch.ones_like(ids), torch.zeros_like(ids), torch.arange(4, device="cuda"))
    with torch.no_grad():
        for _ in range(3):  # torch.jit specialises, cuBLAS sets itself up
            expected = graph(*arguments)
        torch.cuda.synchronize()
        with syncs_are_errors():
            y = graph(*arguments)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        ("float32", "float"),
        ("float16", "float"),
        ("bfloat16", "float"),
        ("float32", "int4"),
        ("float16", "int4"),
    ],
)
def test_a_decoder(tmp_path: Path, dtype: str, weights: str) -> None:
    """onnxruntime-genai's graph for CUDA, with multi-LoRA: logits and tokens of mixed batches."""
    # These adapters double the logits, and with them what rounding does.
    parity = {"tolerance": {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}[dtype]}
    changes = {"base": {"kind": "causal_lm", "path": "base", "weights": weights}, "parity": parity}
    spec = write_decoder(tmp_path, FAMILIES["Llama"], export={"dtype": dtype}, **changes)
    artifact, report = build(spec, tmp_path / "artifacts")
    assert report.status == "passed"
    found = {row.implementation for row in report.rows}
    assert found >= {"onnx-cuda", "onnx-genai-cuda"}
    engines = {"onnx-engine-cuda", "onnx-captured-cuda"}
    assert found & engines == (set() if dtype == "float32" else engines)  # attention is the CPU's
    assert set(report.skipped) & engines == (engines if dtype == "float32" else set())
    gains = [row.gain for row in report.rows if row.gain is not None]
    limit = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}[dtype]
    assert all(abs(gain - 1) < limit for gain in gains)
    if dtype == "float32":
        with pytest.raises(ProviderError, match="its cache cannot be on CUDA"):
            load_generator(artifact, ["cuda"])
        return
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5], [11, 12]]
    texts = load_generator(artifact, ["cuda"]).generate(
        prompts, adapters=["first", None, "second"], max_new_tokens=5
    )
    assert all(0 < len(one.tokens) <= 5 for one in texts)


Decoder = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The artifact of a tiny decoder, in 16 bits; the spec is in `../../spec.yaml`."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, dtype: str) -> Path:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp("decoder")
            parity = {"tolerance": {"float16": 0.05, "bfloat16": 0.4}[dtype]}
            changes: dict[str, Any] = {"export": {"dtype": dtype}, "parity": parity}
            spec = write_decoder(folder, FAMILIES[family], **changes)
            made[family, dtype] = build(spec, folder / "out")[0]
        return made[family, dtype]

    return make


def _batch(lengths: list[int], seed: int = 0) -> tuple[list[list[int]], list[str | None]]:
    random = np.random.default_rng(seed)
    prompts = [random.integers(3, VOCABULARY, length).tolist() for length in lengths]
    return prompts, [(None, "first", "second")[index % 3] for index in range(len(lengths))]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("Llama", "float16"),
        ("Llama", "bfloat16"),
        ("Qwen2", "float16"),
        ("Qwen2", "bfloat16"),
        ("Gemma", "float16"),
        ("Phi-3", "float16"),
        ("Mistral", "float16"),
        ("Gemma 2", "float16"),
        ("Phi-3.5", "float16"),
        ("Phi-3.5", "bfloat16"),
    ],
)
def test_captured_steps_give_the_reference_tokens(
    decoder: Decoder, family: str, dtype: str
) -> None:
    """Or others whose logits are as near as rounding explains, as a build asks of all engines."""
    artifact = decoder(family, dtype)
    generator = load_generator(artifact, ["cuda"], cuda_graphs=True)
    tolerance = stored_tolerance(generator.manifest, MODEL_TOLERANCES)
    reference = load_reference(artifact, generator.manifest)
    rows = compare_tokens("captured", generator, generator.manifest, reference, tolerance)
    assert {row.adapter for row in rows} == {"base", "first", "second"}
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_check_of_a_decoder(decoder: Decoder, dtype: str) -> None:
    """Logits, and the engine's tokens, captured and not."""
    report = check_artifact(decoder("Llama", dtype), ["cuda"])
    assert (report.status, report.skipped) == ("passed", {})
    names = {"onnx-cuda", "onnx-engine-cuda", "onnx-captured-cuda"}
    assert {row.implementation for row in report.rows} == names


def test_check_takes_every_provider_that_runs_here(folder: Path) -> None:
    artifact, _ = build(spec(folder, "masked", "float16"), folder / "checked")
    assert {row.implementation for row in check_artifact(artifact).rows} == {
        "onnx-cpu",
        "onnx-cuda",
    }
    artifact, _ = build(spec(folder, "masked", "bfloat16"), folder / "checked")
    report = check_artifact(artifact)
    assert {row.implementation for row in report.rows} == {"onnx-cuda"}
    assert "no bfloat16 MatMul" in report.skipped["onnx-cpu"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_captured_steps_give_what_plain_steps_give(decoder: Decoder, dtype: str) -> None:
    """Batches of many sizes over one cache, more than its rows, and again."""
    artifact = decoder("Llama", dtype)
    captured = load_generator(artifact, ["cuda"], cuda_graphs=True, rows=16)
    plain = load_generator(artifact, ["cuda"], rows=16)
    runner: Any = plain.engine._worker._runner
    # The same steps: a power of two of rows, where a plain one would have as many as there are.
    runner.step_rows = captured.engine._worker._runner.step_rows
    sizes = [[3, 9, 5], [1], [9, 30, 4, 17, 1], [3, 9, 5], [1, 1], [12] * 20, [3, 9, 5], [1]]
    for seed, lengths in enumerate([*sizes, *sizes]):
        prompts, names = _batch(lengths, seed)
        found = [one.greedy(prompts, names, 12) for one in (captured, plain)]
        assert np.array_equal(*found), lengths
        options: dict[str, Any] = {"adapters": names, "temperature": 2.0, "seed": 3}
        drawn = [one.generate(prompts, max_new_tokens=9, **options) for one in (captured, plain)]
        assert drawn[0] == drawn[1], lengths


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_number_left_in_a_cache_reaches_a_captured_step(decoder: Decoder, dtype: str) -> None:
    generator = load_generator(decoder("Llama", dtype), ["cuda"], cuda_graphs=True, rows=4)
    batch = _batch([3, 20, 2])
    expected = generator.greedy(*batch, 12)
    worker: Any = generator.engine._worker
    memory = worker._runner.cache._memory
    nothing = np.full(memory._value.shape(), np.nan, NUMPY_DTYPES[dtype])
    memory._value.update_inplace(host_value(nothing, dtype))
    for row in worker._rows.rows:
        row.num_read, row.num_touched = 0, generator.engine.length
    assert np.array_equal(generator.greedy(*batch, 12), expected)


def test_captured_steps_from_threads(decoder: Decoder) -> None:
    generator = load_generator(decoder("Llama", "float16"), ["cuda"], cuda_graphs=True, rows=4)
    generator.warm_up()
    batches = [_batch([3 + seed, 9, 5], seed) for seed in range(8)]
    alone = [generator.greedy(*batch, 12) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda batch: generator.greedy(*batch, 12), batches))
    assert all(np.array_equal(*pair) for pair in zip(together, alone, strict=True))


def test_a_captured_generator_hosts_adapters(decoder: Decoder) -> None:
    """Loaded, replaced and paged beside steps that were captured before."""
    artifact = decoder("Llama", "float16")
    generator = load_generator(artifact, ["cuda"], cuda_graphs=True, rows=4)
    generator.warm_up()
    prompt = _batch([20])[0][0]
    names = (None, "first", "second")
    alone = [generator.greedy([prompt], [name], 12).tolist() for name in names]
    generator.load_adapter("third", artifact.parents[1] / "first")
    assert generator.greedy([prompt], ["third"], 12).tolist() == alone[1]
    assert [generator.greedy([prompt], [name], 12).tolist() for name in names] == alone
    running = generator.engine.submit(
        GenerationRequest(tokens=prompt, adapter="first", max_tokens=60, ignore_eos=True)
    )
    generator.load_adapter("first", artifact.parents[1] / "second", timeout=60)
    assert generator.greedy([prompt], ["first"], 12).tolist() != alone[1]
    assert len(running.result(60).answers[0].tokens) == 60


def test_captures_beside_other_generators(decoder: Decoder) -> None:
    """Of the same process, which decode, load and open meanwhile."""
    artifact = decoder("Llama", "float16")
    batch, ended = _batch([20, 9, 5]), threading.Event()
    with load_generator(artifact, ["cuda"], cuda_graphs=True, rows=4) as busy:
        busy.warm_up()
        alone = busy.greedy(*batch, 12)

        def load() -> int:
            count = 0
            while not ended.is_set():
                busy.load_adapter("third", artifact.parents[1] / "first")
                assert np.array_equal(busy.greedy(*batch, 12), alone)
                count += 1
            return count

        with ThreadPoolExecutor(2) as threads:
            loads = [threads.submit(load) for _ in range(2)]
            try:
                for _ in range(6):
                    with load_generator(artifact, ["cuda"], cuda_graphs=True, rows=4) as fresh:
                        fresh.warm_up()
                        assert np.array_equal(fresh.greedy(*batch, 12), alone)
            finally:
                ended.set()
            assert all(one.result(60) > 0 for one in loads)


def test_a_prefix_is_copied_on_the_device(decoder: Decoder) -> None:
    generator = load_generator(decoder("Llama", "float16"), ["cuda"], rows=8)
    prompts = _batch([40, 41, 42, 43])[0]
    requests = [GenerationRequest(tokens=prompt, max_tokens=6) for prompt in prompts]
    first = [generator.engine.submit(request).result(60) for request in requests]
    again = [handle.result(60) for handle in generator.engine.submit_all(requests)]
    assert all(one.reused_tokens >= 32 for one in again)
    assert [one.answers for one in again] == [one.answers for one in first]


def test_a_cache_as_large_as_memory_allows(decoder: Decoder) -> None:
    generator = load_generator(decoder("Llama", "float16"), ["cuda"])
    assert (generator.engine.rows, generator.engine.length) == (32, 128)
    assert cache_sizes._free(("cuda", 0)) > 0


# CUDA graphs of layers and of whole models

_ERRORS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}


def _opened(artifact: Path, kind: Any) -> tuple[Any, Any]:
    """The same artifact with CUDA graphs and without."""
    captured, plain = load(artifact, ["cuda"], cuda_graphs=True), load(artifact, ["cuda"])
    assert isinstance(captured, kind)
    assert isinstance(plain, kind)
    return captured, plain


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens or rows of every replay, in order."""
    sizes: list[int] = []
    run = Replays.run

    def spy(self: Replays, bucket: Bucket) -> None:
        assert bucket.options is not None
        sizes.append(next(iter(bucket.host.values())).shape[0])
        run(self, bucket)

    monkeypatch.setattr(Replays, "run", spy)
    return sizes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("strategy", ["masked", "augmented", "chunked"])
def test_captured_layers(folder: Path, replayed: list[int], strategy: str, dtype: str) -> None:
    """What plain runs give: smaller batches, device tensors, adapters swapped, other threads."""
    path = spec(folder, strategy, dtype)
    artifact, _ = build(path, folder / "captured")
    captured, plain = _opened(artifact, LayersSession)
    captured.warm_up([64, 16])
    replayed.clear()

    def check(layer: str, segments: list[tuple[str | None, int]]) -> None:
        num_tokens = sum(length for _, length in segments)
        x = torch.randn(num_tokens, 32, dtype=getattr(torch, dtype))
        if layer == "words":
            x = torch.randint(0, 40, (num_tokens,))
        array = x.numpy() if layer == "words" else to_numpy(x)
        found, wanted = (one[layer].run(array, segments=segments) for one in (captured, plain))
        assert found.shape == wanted.shape
        error = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
        assert error <= _ERRORS[dtype]
        value = torch.from_dlpack(captured[layer].run(x.cuda(), segments=segments))
        assert value.is_cuda
        assert to_numpy(value).tobytes() == found.tobytes()

    mixes: list[list[tuple[str | None, int]]] = [
        [("sql", 16)],
        [("sql", 3), (None, 2), ("chat", 1)],
        [("chat", 40), ("sql", 1)],
        [(None, 1)],
        [("sql", 30), ("chat", 34)],
    ]
    for segments in mixes:
        check("qkv", segments)
        check("words", segments)
    assert len(replayed) == 4 * len(mixes)
    check("qkv", [("sql", 60), (None, 5)])  # more tokens than any bucket
    check("qkv", [("sql", 0)] * 70 + [("chat", 5)])  # more segments
    assert len(replayed) == 4 * len(mixes)
    for name, source in (("legal", "legal"), ("sql", "chat"), ("legal", "sql")):
        for one in (captured, plain):
            one.load_adapter(name, folder / source)
        check("qkv", [("legal", 5), (None, 2), ("sql", 4)])
    with ThreadPoolExecutor(3) as threads:
        for _ in range(4):
            list(threads.map(lambda segments: check("qkv", segments), mixes))
    check("qkv", [("sql", 3), (None, 2), ("chat", 1)])


def test_a_session_with_captured_graphs_is_closed(folder: Path) -> None:
    """Its graphs were captured by two threads; what opens after it computes the same."""
    artifact, _ = build(spec(folder, "masked", "float16"), folder / "closed")
    x, segments = np.ones((5, 32), np.float16), [("sql", 3), (None, 2)]
    outputs = set()
    for _ in range(3):
        captured, _ = _opened(artifact, LayersSession)
        with captured, ThreadPoolExecutor(1) as thread:
            captured.warm_up([16])
            outputs.add(captured["qkv"].run(x, segments=segments).tobytes())
            outputs.add(thread.submit(captured["qkv"].run, x, segments).result().tobytes())
            assert captured.stats().bucket_hits == 2
        with pytest.raises(ClosedError, match="is closed; open the artifact again"):
            captured["qkv"].run(x, segments=segments)
    assert len(outputs) == 1


def test_a_device_that_is_not_there(folder: Path, capfd: Any) -> None:
    artifact, _ = build(spec(folder, "masked", "float32"), folder / "closed")
    capfd.readouterr()
    with pytest.raises(ProviderError, match=r"there is no device 99; CUDA finds \d+, counted from"):
        load(artifact, [("cuda", {"device_id": 99})])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_captured_model(tmp_path: Path, replayed: list[int], dtype: str, blend: bool) -> None:
    export = {"dtype": dtype, "formats": ["onnx"], "blend": blend}
    artifact, _ = build(write_model_project(tmp_path, export=export), tmp_path / "artifacts")
    captured, plain = _opened(artifact, ModelSession)
    captured.warm_up([(8, 16), (4, 8)])
    replayed.clear()
    names = ["sql", None, {"sql": 0.5, "chat": -1} if blend else "chat", "chat", "sql"]

    def check(batch: int, sequence: int, names: list[Any] = names) -> None:
        ids = torch.randint(1, 60, (batch, sequence))
        mask = ids * 0 + 1
        mask[0, (sequence + 1) // 2 :] = 0
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
        arrays = {name: one.numpy() for name, one in values.items()}
        rows = [names[row % len(names)] for row in range(batch)]
        found, wanted = (one.run(arrays, rows)["last_hidden_state"] for one in (captured, plain))
        assert found.shape == wanted.shape
        error = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
        assert error <= _ERRORS[dtype]
        tensors = {name: one.cuda() for name, one in values.items()}
        value = torch.from_dlpack(captured.run(tensors, rows)["last_hidden_state"])
        difference = np.abs(to_numpy(value).astype(np.float64) - found.astype(np.float64)).max()
        assert difference <= _ERRORS[dtype]

    for batch, sequence in ((4, 8), (3, 5), (8, 16), (5, 9), (1, 1), (4, 8)):
        check(batch, sequence)
    # Device tensors are replayed where their texts are as long as a bucket's.
    assert len(replayed) == 6 + 3
    check(9, 5)
    check(2, 17)
    assert len(replayed) == 6 + 3
    for name, source in (("legal", "legal"), ("sql", "legal"), ("legal", "chat")):
        for one in (captured, plain):
            one.load_adapter(name, tmp_path / source)
        check(3, 8, ["legal", None, "sql"])
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda size: check(*size), [(4, 8), (3, 5), (8, 16), (1, 1)] * 4))
    check(4, 8)


def test_a_captured_model_warmed_up_by_another_thread(tmp_path: Path) -> None:
    """The thread may end: its graphs are not the only ones."""
    export = {"dtype": "float16", "formats": ["onnx"]}
    artifact, _ = build(write_model_project(tmp_path, export=export), tmp_path / "artifacts")
    captured, plain = _opened(artifact, ModelSession)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(captured.warm_up, [(4, 8)]).result()
    ids = np.random.default_rng(0).integers(1, 60, (3, 7))
    values = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    for _ in range(3):
        names = ["sql", None, "chat"]
        found, wanted = (one.run(values, names)["last_hidden_state"] for one in (captured, plain))
        assert np.abs(found.astype(np.float64) - wanted).max() <= _ERRORS["float16"]
        captured.warm_up([(4, 8), (2, 8)])  # and for this one


def test_captured_images(tmp_path: Path, replayed: list[int]) -> None:
    export = {"dtype": "float16", "formats": ["onnx"]}
    artifact, _ = build(write_vit_project(tmp_path, export=export), tmp_path / "artifacts")
    captured, plain = _opened(artifact, ModelSession)
    captured.warm_up([4])
    replayed.clear()
    for batch in (4, 2, 1, 5):
        pixels = torch.randn(batch, 3, 8, 12).half()
        names = [("birds", None)[row % 2] for row in range(batch)]
        values: list[dict[str, Any]] = [{"pixel_values": pixels.numpy()}]
        found, wanted = (one.run(values[0], names) for one in (captured, plain))
        error = found["last_hidden_state"].astype(np.float64) - wanted["last_hidden_state"]
        assert np.abs(error).max() <= _ERRORS["float16"]
        on_device = captured.run({"pixel_values": pixels.cuda()}, names)["last_hidden_state"]
        difference = to_numpy(torch.from_dlpack(on_device)) - found["last_hidden_state"]
        assert np.abs(difference).max() <= _ERRORS["float16"]
    assert len(replayed) == 6


def test_the_capability_of_a_device() -> None:
    load_cuda_libraries()
    assert compute_capability(0) == torch.cuda.get_device_capability(0)
