"""Batches padded into fixed memory, on the CPU, where nothing is captured: the padding, the choice
of a bucket, threads. tests/gpu/test_gpu.py captures.
"""

import gc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapters import write_adapter
from support.builds import write_model_project, write_tenants, write_vit_project
from support.families import FAMILIES, write_model, write_spec
from support.home import Home

import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.buckets.bucket import Bucket
from loraexport_runtime.buckets.replays import Replays, _run
from loraexport_runtime.buckets.rows import RowBuckets
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.sessions.load import make_session

CPU = [("CPUExecutionProvider", {})]
STRATEGIES = ("masked", "augmented", "chunked")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs of buckets and those outside of them, by name, in order."""
    names: list[str] = []
    for name in ("run", "run_plain"):
        call = getattr(Replays, name)

        def spy(self: Replays, *args: Any, name: str = name, call: Any = call) -> Any:
            names.append(name)
            return call(self, *args)

        monkeypatch.setattr(Replays, name, spy)
    return names


def open_with_buckets(artifact: Path) -> Any:
    return make_session(artifact, Manifest.read(artifact), CPU, 1, cuda_graphs=True)


def near(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    error = np.abs(found.astype(np.float64) - wanted).max()
    assert error <= tolerance * np.abs(wanted.astype(np.float64)).max()


# Layers


@pytest.fixture(scope="module")
def layers(home: Home) -> Callable[..., Path]:
    """(strategy, dtype) -> the artifact of a fused layer, a plain one and an embedding."""

    def artifact(strategy: str, dtype: str = "float32") -> Path:
        export = {"formats": ["onnx"], "strategy": strategy, "dtype": dtype}
        return home.artifact(write_tenants, export=export, slots=3)

    return artifact


def draw(layer: str, num_tokens: int, dtype: str = "float32") -> np.ndarray:
    generator = np.random.default_rng(num_tokens)
    if layer == "words":
        return generator.integers(0, 40, num_tokens)
    return generator.standard_normal((num_tokens, 32)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_padded_batch_of_a_layer(
    layers: Callable[..., Path], ran: list[str], strategy: str, dtype: str
) -> None:
    plain = lr.load(layers(strategy, dtype), threads=1)
    session = open_with_buckets(layers(strategy, dtype))
    session.warm_up([64, 8])
    ran.clear()
    mixes: list[list[tuple[str | None, int]]] = [
        [("sql", 3), (None, 2)],
        [("chat", 1)],
        [("spare", 8)],
        [("chat", 0), ("sql", 4), ("chat", 25), ("spare", 1)],
        [(None, 64)],
        [("spare", 2), ("sql", 3), ("chat", 2)],  # after a larger one in the same memory
    ]
    for segments in mixes:
        num_tokens = sum(length for _, length in segments)
        for name in ("qkv", "up", "words"):
            x = draw(name, num_tokens, dtype)
            found, wanted = (one[name].run(x, segments=segments) for one in (session, plain))
            near(found, wanted, 1e-5 if dtype == "float32" else 4e-3)
            value = session[name].run(torch.from_numpy(x), segments=segments)
            assert torch.from_dlpack(value).numpy().tobytes() == found.tobytes()
    assert ran == ["run"] * 6 * len(mixes)


def test_what_fits_into_no_bucket(layers: Callable[..., Path], ran: list[str]) -> None:
    plain = lr.load(layers("masked"), threads=1)["up"]
    session = open_with_buckets(layers("masked"))
    layer = session["up"]
    x, segments = draw("up", 100), [("sql", 60), (None, 40)]
    wanted = plain.run(x, segments=segments)
    near(layer.run(x, segments=segments), wanted)
    session.warm_up([16])
    ran.clear()
    near(layer.run(x, segments=segments), wanted)
    layer.run(x[:16], segments=[("sql", 16)])
    session["qkv"].run(x[:16], segments=[("sql", 16)])
    assert layer.run(x[:0], segments=[("sql", 0)]).shape == (0, 48)
    assert ran == ["run_plain", "run", "run"]


@pytest.mark.parametrize("strategy", ["masked", "chunked"])
def test_more_segments_than_a_bucket_has(
    layers: Callable[..., Path], ran: list[str], strategy: str
) -> None:
    most = {"masked": 64, "chunked": 4}[strategy]  # 3 slots and the base
    plain = lr.load(layers(strategy), threads=1)["qkv"]
    layer = open_with_buckets(layers(strategy))["qkv"]
    layer.warm_up([80])
    ran.clear()
    names = ["sql", None, "chat", "spare"]
    for num_segments, num_tokens in ((most, 70), (most, 80), (most + 1, 70)):
        lengths = [1] * (num_segments - 1) + [num_tokens - num_segments + 1]
        segments = [(names[at % 4], length) for at, length in enumerate(lengths)]
        x = draw("qkv", num_tokens)
        near(layer.run(x, segments=segments), plain.run(x, segments=segments))
    assert ran == ["run", "run", "run_plain"]


def test_raw_segments(layers: Callable[..., Path]) -> None:
    layer = open_with_buckets(layers("masked"))["qkv"]
    layer.warm_up([16])
    x = draw("qkv", 9)
    named = layer.run(x, segments=[("chat", 4), ("sql", 0), (None, 3), ("sql", 2)])
    indptr, slots = np.array([0, 4, 4, 7, 9]), np.array([2, 1, 0, 1])
    assert layer.run(x, seg_indptr=indptr, seg_slots=slots).tobytes() == named.tobytes()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_number_left_in_a_bucket_reaches_a_row(
    layers: Callable[..., Path], strategy: str
) -> None:
    layer = open_with_buckets(layers(strategy))["qkv"]
    layer.warm_up([16])
    x, segments = draw("qkv", 7), [("sql", 3), ("chat", 4)]
    wanted = layer.run(x, segments=segments)
    layer.run(np.full((16, 32), np.nan, np.float32), segments=[("spare", 16)])
    assert layer.run(x, segments=segments).tobytes() == wanted.tobytes()


def test_an_output_stays_as_it_is(layers: Callable[..., Path]) -> None:
    layer = open_with_buckets(layers("masked"))["qkv"]
    layer.warm_up([8])
    x = draw("qkv", 8)
    array = layer.run(x, segments=[("sql", 8)])
    value = torch.from_dlpack(layer.run(torch.from_numpy(x), segments=[("sql", 8)]))
    kept = array.copy()
    layer.run(-x, segments=[("chat", 8)])
    assert array.tobytes() == kept.tobytes() == value.numpy().tobytes()


def test_a_hot_load_is_seen(layers: Callable[..., Path], tmp_path: Path) -> None:
    sites = {"blocks.0.q": (32, 32), "blocks.0.up": (32, 48)}
    fresh = write_adapter(tmp_path / "fresh", sites, rank=3, seed=9)
    plain, session = lr.load(layers("masked"), threads=1), open_with_buckets(layers("masked"))
    session.warm_up([8])
    x = draw("qkv", 5)
    before = session["qkv"].run(x, segments=[("sql", 5)])
    for one in (plain, session):
        one.load_adapter("sql", fresh)
    after = session["qkv"].run(x, segments=[("sql", 5)])
    near(after, plain["qkv"].run(x, segments=[("sql", 5)]))
    assert np.abs(after - before).max() > 0.05


@pytest.mark.slow
def test_a_strategy_that_cannot_be_captured(layers: Callable[..., Path]) -> None:
    with pytest.raises(
        lr.ProviderError, match="layer 'qkv' is computed by the strategy 'segmented', whose shapes"
    ):
        open_with_buckets(layers("segmented"))


# Whole models


@pytest.fixture(scope="module")
def model(home: Home) -> Path:
    return home.artifact(write_model_project, export={"formats": ["onnx"], "blend": True})


def texts(batch: int, sequence: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch * sequence)
    mask = np.ones((batch, sequence), np.int64)
    mask[0, (sequence + 1) // 2 :] = 0
    ids = generator.integers(1, 60, (batch, sequence)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}


NAMES: list[Any] = ["sql", None, "chat", {"sql": 0.5, "chat": -1.5}, "sql"]


def test_a_padded_batch_of_a_model(model: Path, ran: list[str]) -> None:
    plain = lr.load(model, threads=1)
    session = open_with_buckets(model)
    session.warm_up([(4, 16), (2, 8), (8, 16)])
    ran.clear()
    sizes = [(1, 1), (2, 8), (2, 5), (3, 7), (4, 16), (5, 9), (1, 16), (2, 3)]
    for batch, sequence in sizes:
        values, names = texts(batch, sequence), NAMES[:batch]
        found, wanted = (one.run(values, names) for one in (session, plain))
        assert list(found) == list(wanted)
        for name in wanted:
            near(found[name], wanted[name])
            assert found[name].flags.c_contiguous
    assert ran == ["run"] * len(sizes)
    session.run(texts(9, 4))
    session.run(texts(2, 17))
    assert ran == ["run"] * len(sizes) + ["run_plain"] * 2


def test_the_smallest_bucket_is_taken(model: Path) -> None:
    session = open_with_buckets(model)
    session.warm_up([(8, 16), (2, 8), (4, 16), (16, 8), (4, 16)])
    found = {
        size: session._buckets.find(*size, on_host=True)
        for size in ((1, 8), (2, 9), (4, 8), (5, 8), (9, 3), (8, 9), (16, 9))
    }
    assert {size: one and (one.rows, one.tokens) for size, one in found.items()} == {
        (1, 8): (2, 8),
        (2, 9): (4, 16),
        (4, 8): (4, 16),
        (5, 8): (8, 16),
        (9, 3): (16, 8),
        (8, 9): (8, 16),
        (16, 9): None,
    }


def test_device_tensors_are_not_filled_up_with_tokens(model: Path, ran: list[str]) -> None:
    session = open_with_buckets(model)
    session.warm_up([(4, 8)])
    ran.clear()
    for batch, sequence in ((4, 8), (3, 8), (3, 7)):
        values, names = texts(batch, sequence), NAMES[:batch]
        tensors = {name: torch.from_numpy(one) for name, one in values.items()}
        y = torch.from_dlpack(session.run(tensors, names)["last_hidden_state"])
        near(y.numpy(), session.run(values, names)["last_hidden_state"])
    assert ran == ["run"] * 4 + ["run_plain", "run"]


def test_rows_of_a_bucket_do_not_depend_on_each_other(model: Path) -> None:
    session = open_with_buckets(model)
    session.warm_up([(4, 16)])
    values = texts(3, 11)
    mixed = session.run(values, NAMES[1:4])["last_hidden_state"]
    for row, name in enumerate(NAMES[1:4]):
        alone = session.run({key: one[[row]] for key, one in values.items()}, [name])
        assert alone["last_hidden_state"][0].tobytes() == mixed[row].tobytes()


def test_a_model_that_padding_would_change(
    model: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    """As if it did not heed its mask: then a bucket takes texts of its own length only."""
    send = Bucket.send

    def send_unmasked(bucket: Bucket) -> None:
        bucket.host["attention_mask"][:] = 1
        send(bucket)

    monkeypatch.setattr(Bucket, "send", send_unmasked)
    session = open_with_buckets(model)
    session.warm_up([(4, 8)])
    ran.clear()
    for batch, sequence in ((4, 8), (2, 8), (2, 7)):
        session.run(texts(batch, sequence), NAMES[:batch])
    assert ran == ["run", "run", "run_plain"]


@pytest.mark.slow
def test_a_model_that_takes_the_last_token(tmp_path: Path, ran: list[str]) -> None:
    """Llama's classifier: the last one that is not the padding id, whatever the mask says."""

    def config() -> Any:
        made = FAMILIES["Llama"].config()
        made.pad_token_id = 2  # buckets fill up with 0
        return made

    write_model(replace(FAMILIES["Llama"], config=config), "sequence-classification", tmp_path)
    write_spec("sequence-classification", tmp_path, "onnx")
    artifact = build(tmp_path / "spec.yaml", tmp_path / "out")[0]
    plain, session = lr.load(artifact, threads=1), open_with_buckets(artifact)
    assert isinstance(plain, lr.ModelSession)
    session.warm_up([(4, 8)])
    ran.clear()
    names = [entry.name for entry in plain.model.inputs]
    for batch, sequence in ((4, 8), (3, 8), (3, 5)):
        ids = np.random.default_rng(sequence).integers(5, 20, (batch, sequence))
        values = {"input_ids": ids, "attention_mask": ids * 0 + 1}
        values = {name: values[name] for name in names}
        near(session.run(values)["logits"], plain.run(values)["logits"])
    assert ran == ["run", "run", "run_plain"]


def test_images(tmp_path: Path, ran: list[str]) -> None:
    spec = write_vit_project(tmp_path, export={"formats": ["onnx"], "dtype": "float16"})
    artifact = build(spec, tmp_path / "artifacts")[0]
    plain, session = lr.load(artifact, threads=1), open_with_buckets(artifact)
    assert isinstance(plain, lr.ModelSession)
    plain.warm_up([2])
    session.warm_up([2, 6])
    ran.clear()
    generator = np.random.default_rng(0)
    for batch in (1, 2, 5, 7):
        pixels = generator.standard_normal((batch, 3, 8, 12)).astype(np.float16)
        names = [("birds", None)[row % 2] for row in range(batch)]
        found, wanted = (one.run({"pixel_values": pixels}, names) for one in (session, plain))
        near(found["last_hidden_state"], wanted["last_hidden_state"], 2e-2)
        on_device = session.run({"pixel_values": torch.from_numpy(pixels)}, names)
        y = torch.from_dlpack(on_device["last_hidden_state"]).numpy()
        assert y.tobytes() == found["last_hidden_state"].tobytes()
    assert ran == ["run"] * 6 + ["run_plain"] * 2
    with pytest.raises(lr.InputError, match=re.escape("sizes[0] is (2, 7); expected a list such")):
        session.warm_up([(2, 7)])


# Threads, and sessions without buckets


def test_threads(model: Path, layers: Callable[..., Path]) -> None:
    """Each gets its own rows, whichever thread warmed up, while adapters are paged."""
    session = open_with_buckets(model)
    session.warm_up([(4, 16)])
    tokens = open_with_buckets(layers("masked"))
    tokens.warm_up([16])
    batches = [(texts(1 + at % 5, 3 + at), NAMES[: 1 + at % 5]) for at in range(12)]
    wanted = [session.run(*batch)["last_hidden_state"] for batch in batches]
    parts = [(draw("qkv", 2 + at), [("sql", 1), ("chat", 1 + at)]) for at in range(12)]
    rows = [tokens["qkv"].run(x, segments=segments) for x, segments in parts]

    def work(at: int) -> None:
        found = session.run(*batches[at % 12])["last_hidden_state"]
        assert found.tobytes() == wanted[at % 12].tobytes()
        x, segments = parts[at % 12]
        found = tokens["qkv"].run(x, segments=segments)
        assert found.tobytes() == rows[at % 12].tobytes()
        if at % 10 == 0:
            tokens.load_adapter("spare")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(96)))


def test_who_runs_a_bucket(layers: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that warmed it up, else the session's own: those two have captured it."""
    import threading

    from loraexport_runtime.buckets import replays

    threads: list[str] = []
    run = _run

    def spy(bucket: Bucket) -> None:
        threads.append(threading.current_thread().name.rsplit("_", 1)[0])
        run(bucket)

    monkeypatch.setattr(replays, "_run", spy)
    layer = open_with_buckets(layers("masked"))["up"]
    ours, x = "loraexport-replay", draw("up", 3)
    main = threading.current_thread().name.rsplit("_", 1)[0]
    layer.warm_up([8])
    assert threads == [ours, ours, main, main]
    layer.warm_up([8])
    layer.run(x, segments=[("sql", 3)])
    assert threads[4:] == [main]
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        pool.submit(layer.run, x, [("sql", 3)]).result()
        assert threads[5:] == [ours]
        pool.submit(layer.warm_up, [8]).result()
        pool.submit(layer.run, x, [("sql", 3)]).result()
    assert threads[6:] == [ours, ours, "other", "other", "other"]


def test_warm_up_without_cuda_graphs(
    model: Path, layers: Callable[..., Path], ran: list[str]
) -> None:
    session = lr.load(model, threads=1)
    assert isinstance(session, lr.ModelSession)
    session.warm_up([(4, 8)])
    session.run(texts(2, 8), NAMES[:2])
    tokens = lr.load(layers("segmented"), threads=1)
    assert isinstance(tokens, lr.LayersSession)
    tokens.warm_up([8])
    assert ran == []


@pytest.mark.parametrize(
    "sizes", [[0], [8, -1], [2.0], [True], ["8"], [(8, 8)], [None], 8, "8", {8: 1}, None]
)
def test_sizes_that_are_no_numbers_of_tokens(layers: Callable[..., Path], sizes: Any) -> None:
    for session in (lr.load(layers("masked")), open_with_buckets(layers("masked"))):
        expected = r"warm_up: .*; expected a list such as \[64, 512\], of numbers of tokens"
        with pytest.raises(lr.InputError, match=expected):
            session.warm_up(sizes)
        with pytest.raises(lr.InputError, match=expected):
            session["up"].warm_up(sizes)


@pytest.mark.parametrize("sizes", [[8], [(8,)], [(8, 0)], [(8, 2.0)], [(1, 2, 3)], "88", (8, 8)])
def test_sizes_that_are_no_rows_and_tokens(model: Path, sizes: Any) -> None:
    for session in (lr.load(model), open_with_buckets(model)):
        expected = r"expected a list such as \[\(32, 128\), \(64, 512\)\], of \(rows, tokens per r"
        with pytest.raises(lr.InputError, match=expected):
            session.warm_up(sizes)


def test_cuda_graphs_on_another_device(model: Path) -> None:
    with pytest.raises(lr.ProviderError, match="CUDA graphs were asked for on CPUExecutionProvid"):
        lr.load(model, cuda_graphs=True)


@pytest.mark.parametrize("value", ["1", 1, True])
def test_the_option_of_onnxruntime_alone(model: Path, value: Any) -> None:
    with pytest.raises(lr.ProviderError, match="one batch's graph for all others; pass cuda_grap"):
        lr.load(model, [("cuda", {"enable_cuda_graph": value})])


def test_a_capture_that_fails(layers: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from loraexport_runtime.buckets import replays

    def refuse(bucket: Bucket) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replays, "_run", refuse)
    session = open_with_buckets(layers("masked"))
    with pytest.raises(
        lr.ProviderError,
        match=r"cannot run or capture this graph with x \[8, 32\], .*: operation not permitted when"
        r".*\. Do not warm up more tokens per row .* again, without cuda_graphs",
    ):
        session.warm_up([8])
    session["up"].run(draw("up", 3), segments=[("sql", 3)])


def test_a_bucket_that_came_to_nothing_is_forgotten(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one at its address would pass for captured."""

    def refuse(*args: Any) -> bool:
        raise RuntimeError("no memory")

    session = open_with_buckets(model)
    with monkeypatch.context() as patch:
        patch.setattr(RowBuckets, "_is_neutral", refuse)
        for _ in range(8):
            with pytest.raises(RuntimeError, match="no memory"):
                session.warm_up([(2, 8)])
    gc.collect()
    assert len(session._replays._mine.buckets) == 0
