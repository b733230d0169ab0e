"""A session in a service: closed, counted, logged, told by type, its adapters replaced."""

import gc
import logging
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.adapters import write_adapter
from support.builds import write_model_project
from support.manifests import edit_manifest
from support.processes import refused_in_a_child
from support.waiting import DEADLINE, num_inside, wait_until

import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.adapters.files import digest_adapter
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.sessions.load import make_session

CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
ON_CPU = "stock operators: on a CPU kernels are taken by kernels=True alone"
X = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
SITES = {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    export = {"formats": ["onnx"]}
    return build(write_model_project(folder, export=export), folder / "artifacts")[0]


@pytest.fixture
def session(tenants: Path) -> Iterator[lr.LayersSession]:
    with lr.load_layers(tenants, threads=1) as opened:
        yield opened


def texts(batch: int = 2, sequence: int = 3) -> dict[str, np.ndarray]:
    ids = np.arange(1, 1 + batch * sequence).reshape(batch, sequence)
    return {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}


def open_with_buckets(artifact: Path) -> Any:
    return make_session(artifact, Manifest.read(artifact), CPU, 1, cuda_graphs=True)


# Closing


def calls_of_layers(session: lr.LayersSession, folder: Path) -> dict[str, Callable[[], object]]:
    layer = session["up"]
    numbers = {"seg_indptr": np.array([0, 4]), "seg_slots": np.array([1])}
    return {
        "run": lambda: layer.run(X, segments=[("sql", 4)]),
        "run by number": lambda: layer.run(X, **numbers),
        "run of the base": lambda: layer.run(X, segments=[(None, 4)]),
        "warm_up": lambda: session.warm_up([4]),
        "warm_up of a layer": lambda: layer.warm_up([4]),
        "load_adapter": lambda: session.load_adapter("spare"),
        "unload_adapter": lambda: session.unload_adapter("sql"),
        "pin": lambda: session.pin("sql"),
        "unpin": lambda: session.unpin("sql"),
        "adapters": lambda: session.adapters,
        "list_adapters": session.list_adapters,
        "export_adapters": lambda: session.export_adapters(folder),
        "with": session.__enter__,
    }


def test_a_use_after_close(tenants: Path, tmp_path: Path) -> None:
    session = lr.load_layers(tenants, threads=1)
    calls = calls_of_layers(session, tmp_path)
    session["up"].run(X, segments=[("sql", 4)])
    session.close()
    session.close()
    text = f"^the session of {tenants} is closed; open the artifact again$"
    for call in calls.values():
        with pytest.raises(lr.ClosedError, match=text):
            call()
    assert session.stats().runs == 1, "what it did can be told still"
    assert session.manifest.name == "tiny"
    assert issubclass(lr.ClosedError, lr.LoraexportError)


def test_no_call_hangs_in_the_child_of_a_fork(tenants: Path, tmp_path: Path) -> None:
    """A thread of the parent holds the slots' lock, which nobody opens in the child."""
    session = lr.load_layers(tenants, threads=1)
    calls: dict[str, Callable[[], object]] = {
        **calls_of_layers(session, tmp_path),
        "stats": session.stats,
    }
    said = refused_in_a_child(calls, session.close, session._host.slots._lock)
    assert said == [*calls, "closed"]
    session.close()


def test_with_closes_a_model(model: Path) -> None:
    with lr.load_model(model, threads=1) as session:
        session.run(texts(), ["sql", None])
    for call in (lambda: session.run(texts()), lambda: session.warm_up([(1, 2)])):
        with pytest.raises(lr.ClosedError, match="is closed; open the artifact again"):
            call()


@pytest.mark.parametrize("kind", ["layers", "model"])
def test_close_gives_memory_and_threads_up(tenants: Path, model: Path, kind: str) -> None:
    """At once, and not when Python next looks for garbage."""
    session = open_with_buckets(tenants if kind == "layers" else model)
    session.warm_up([4] if kind == "layers" else [(2, 4)])
    if kind == "layers":
        session["up"].run(X, segments=[("sql", 4)])
        graphs = [layer._session for layer in session.values()]
    else:
        session.run(texts(), ["sql", None])
        graphs = [session._session]
    buffers = [buffer.value for buffer in session._host._stacks.values()]
    blocks = [
        block
        for adapter in session._host.slots._table.adapters.values()
        for block in (adapter.blocks or {}).values()
    ]
    kept = [weakref.ref(each) for each in (*graphs, *buffers, *blocks)]
    assert len(kept) > 4
    del graphs, buffers, blocks
    (worker,) = (t for t in threading.enumerate() if t.name.startswith("loraexport-replay"))
    gc.disable()
    try:
        session.close()
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()
    assert not worker.is_alive()


@pytest.mark.parametrize("has_buckets", [False, True])
@pytest.mark.parametrize("kind", ["layers", "model"])
def test_a_session_that_is_dropped_is_freed_at_once(
    tenants: Path, model: Path, kind: str, has_buckets: bool
) -> None:
    """Without `close`, and without a look of Python for circles."""
    artifact = tenants if kind == "layers" else model
    session: Any = open_with_buckets(artifact) if has_buckets else lr.load(artifact, threads=1)
    if has_buckets:
        session.warm_up([4] if kind == "layers" else [(2, 4)])
    if kind == "layers":
        session["up"].run(X, segments=[("spare", 4)])
    else:
        session.run(texts(), ["sql", None])
    session.load_adapter("sql")
    session.pin("sql")
    with pytest.raises(lr.UnknownAdapterError):
        session.pin("nobody")
    graphs = [layer._session for layer in session.values()] if kind == "layers" else []
    buffers = [buffer.value for buffer in session._host._stacks.values()]
    objects = (session, session._host, session._host.slots, *graphs, *buffers)
    kept = [weakref.ref(each) for each in objects]
    del graphs, buffers, objects
    gc.disable()
    try:
        del session
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("num_waiting", [0, 2])
def test_close_waits_for_runs(
    tenants: Path, monkeypatch: pytest.MonkeyPatch, num_waiting: int
) -> None:
    """Those too that wait for a slot; they give what they would have given."""
    wanted = {
        name: lr.load_layers(tenants, threads=1)["up"].run(X, segments=[(name, 4)]).tobytes()
        for name in ("sql", "spare")
    }
    session = lr.load_layers(tenants, threads=1)
    session.pin("chat")
    running, go = threading.Event(), threading.Event()
    run = ort.InferenceSession.run_with_iobinding

    def hold(self: Any, *args: Any) -> None:
        running.set()
        assert go.wait(DEADLINE)
        run(self, *args)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", hold)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(session["up"].run, X, [("sql", 4)])
        assert running.wait(DEADLINE)
        others = [pool.submit(session["up"].run, X, [("spare", 4)]) for _ in range(num_waiting)]
        wait_until(lambda: num_inside(session._gate) == 1 + num_waiting)
        closing = [pool.submit(session.close) for _ in range(2)]
        wait_until(lambda: session._gate.is_closed)
        with pytest.raises(lr.ClosedError):
            session["up"].run(X, segments=[("sql", 4)])
        assert not any(one.done() for one in (first, *closing))
        go.set()
        for one in closing:
            one.result(DEADLINE)
        assert first.result(DEADLINE).tobytes() == wanted["sql"]
        assert {one.result(DEADLINE).tobytes() for one in others} <= {wanted["spare"]}


def test_close_under_load(tenants: Path) -> None:
    """Eight threads run until they are told that it is closed; every result is whole."""
    wanted = lr.load_layers(tenants, threads=1)["up"].run(X, segments=[("sql", 4)]).tobytes()
    session = lr.load_layers(tenants, threads=1)
    started = threading.Barrier(9)

    def work() -> int:
        layer, runs = session["up"], 0
        started.wait(DEADLINE)
        while True:
            try:
                found = layer.run(X, segments=[("sql", 2), ("sql", 2)])
            except lr.ClosedError:
                return runs
            assert found.tobytes() == wanted
            runs += 1

    with ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(work) for _ in range(8)]
        started.wait(DEADLINE)
        wait_until(lambda: session.stats().runs >= 20)
        session.close()
        assert sum(one.result(DEADLINE) for one in workers) == session.stats().runs


# Counting


def test_stats(session: lr.LayersSession) -> None:
    assert session.stats() == lr.SessionStats(2, 0, 0, 0, 0, 0.0, 0, 0.0, 0, 0, ON_CPU)
    layer = session["up"]
    layer.run(X, segments=[("sql", 2), (None, 1), ("sql", 1)])
    layer.run(X, segments=[("chat", 4)])
    layer.run(X, segments=[("spare", 2), ("chat", 2)])  # sql goes out
    layer.run(X, seg_indptr=np.array([0, 2, 4]), seg_slots=np.array([1, 2]))
    with pytest.raises(lr.UnknownAdapterError):
        layer.run(X, segments=[("nobody", 4)])
    stats = session.stats()
    assert (stats.hits, stats.pages, stats.evictions) == (1 + 1 + 1 + 2, 1, 1)
    assert (stats.slots_held, stats.runs, stats.waits, stats.wait_seconds) == (2, 4, 0, 0.0)
    assert stats.run_seconds > 0
    assert (stats.bucket_hits, stats.bucket_misses) == (0, 0)
    session.load_adapter("sql")  # an eviction, and no run
    session.unload_adapter("spare")
    session.pin("sql")
    later = session.stats()
    assert (later.evictions, later.pages, later.runs) == (2, 1, 4)
    assert (later.slots_held, later.hits) == (len(session.adapters), stats.hits + 1)
    session.warm_up([4])
    assert session.stats() == later, "warming up is no run"


def test_stats_of_waits(session: lr.LayersSession) -> None:
    layer = session["up"]
    with ThreadPoolExecutor(2) as pool:
        with session._host.slots.lease(["sql", "chat"], is_run=False):
            waiting = [pool.submit(layer.run, X, [("spare", 4)]) for _ in range(2)]
            wait_until(lambda: session.stats().waits == 2)
        for one in waiting:
            one.result(DEADLINE)
    stats = session.stats()
    assert (stats.waits, stats.runs, stats.pages, stats.evictions) == (2, 2, 1, 1)
    assert stats.wait_seconds > 0


def test_stats_of_buckets(tenants: Path, model: Path) -> None:
    layers = open_with_buckets(tenants)
    layers.warm_up([8])
    for num_tokens in (4, 3, 4):
        layers["up"].run(X[:num_tokens], segments=[("sql", num_tokens)])
    layers["up"].run(np.tile(X, (3, 1)), segments=[("sql", 12)])
    stats = layers.stats()
    assert (stats.bucket_hits, stats.bucket_misses, stats.runs) == (3, 1, 4)
    with open_with_buckets(model) as whole:
        whole.warm_up([(2, 4)])
        for size in ((2, 4), (1, 3), (2, 5)):
            whole.run(texts(*size))
        stats = whole.stats()
        assert (stats.bucket_hits, stats.bucket_misses, stats.runs) == (2, 1, 3)


def test_stats_of_many_threads(session: lr.LayersSession) -> None:
    names = ["sql", "chat", "spare"]

    def work(at: int) -> None:
        for turn in range(25):
            session["up"].run(X, segments=[(names[(at + turn) % 3], 4)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    stats = session.stats()
    assert stats.runs == 200
    assert stats.hits + stats.pages == 200
    assert stats.evictions == stats.pages, "every slot was taken from the start"


# Adapters, as they are listed


def test_where_an_adapter_comes_from(
    session: lr.LayersSession, tenants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "fresh", SITES, rank=3, seed=9)
    monkeypatch.chdir(tmp_path)
    before = session.list_adapters()
    assert [one.generation for one in before.values()] == [1, 1, 1]
    chat = before["chat"]
    assert (chat.path, chat.scale) == (None, 0.5)
    assert chat.digest == digest_adapter(tenants / "adapters/chat")
    session.load_adapter("sql", "fresh", scale=0.25)
    session.load_adapter("chat", scale=3)
    found = session.list_adapters()
    assert (found["sql"].path, found["sql"].scale) == (Path("fresh"), 0.25)
    assert found["sql"].digest == digest_adapter(tmp_path / "fresh") != before["sql"].digest
    assert (found["chat"].path, found["chat"].scale) == (None, 1.5)
    assert found["chat"].digest == chat.digest
    assert found["spare"] == before["spare"]


def test_generations_only_grow(session: lr.LayersSession, tmp_path: Path) -> None:
    fresh = write_adapter(tmp_path / "fresh", SITES)

    def generation(name: str) -> int:
        return session.list_adapters()[name].generation

    seen = [generation("sql")]
    for _ in range(2):
        session.load_adapter("sql", fresh)
        seen.append(generation("sql"))
        session.load_adapter("chat")
        session.unload_adapter("sql")
        session.load_adapter("sql", fresh)
        seen.append(generation("sql"))
    assert seen == sorted(set(seen))
    session["up"].run(X, segments=[("spare", 2), ("chat", 2)])  # pages sql out
    assert generation("sql") == seen[-1]
    with pytest.raises(lr.AdapterError):
        session.load_adapter("sql", tmp_path)
    assert generation("sql") == seen[-1], "a load that failed is none"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: session.load_adapter("sql", fresh), range(12)))
    assert generation("sql") == seen[-1] + 12


# Logging


def test_what_is_logged(tenants: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="loraexport_runtime")
    fresh = write_adapter(tmp_path / "fresh", SITES, rank=3)
    session = lr.load_layers(tenants, threads=1)
    session["up"].run(X, segments=[("spare", 4)])
    session.load_adapter("fresh", fresh)
    session.load_adapter("spare")
    session.unload_adapter("fresh")
    session.close()
    size = sum(3 * (rows + columns) * 4 for rows, columns in SITES.values())
    assert size > 0
    texts = [record.getMessage() for record in caplog.records]
    assert all(record.name.startswith("loraexport_runtime.") for record in caplog.records)
    assert texts[0].startswith(f"opened {tenants} (layers, 2 slots) on CPUExecutionProvider in ")
    assert texts[1:3] == [
        "adapter 'spare' paged into slot 1, which 'sql' leaves",
        "adapter 'chat' leaves slot 2 for 'fresh'",
    ]
    blocks = sum(stack.rows_per_slot * stack.shape[1] * 4 for stack in stacks_of(tenants))
    digest = digest_adapter(fresh)
    assert texts[3:] == [
        f"adapter 'fresh' loaded into slot 2 from {fresh}: {blocks} bytes, sha256 {digest}",
        f"adapter 'spare' loaded into slot 1 from the artifact: {blocks} bytes, sha256"
        f" {digest_adapter(tenants / 'adapters/spare')}",
        "adapter 'fresh' unloaded",
        f"closed {tenants}",
    ]


def stacks_of(artifact: Path) -> list[Any]:
    return [stack for layer in Manifest.read(artifact).layers for stack in layer.stacks]


def test_what_is_logged_of_buckets(
    tenants: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="loraexport_runtime")
    session = open_with_buckets(tenants)
    session["up"].warm_up([4])
    session["up"].run(np.tile(X, (2, 1)), segments=[("sql", 8)])
    whole = open_with_buckets(model)
    whole.run(texts(2, 5))
    assert [record.getMessage() for record in caplog.records] == [
        "warmed up a bucket of x [4, 32], seg_indptr [6], seg_slots [5]",
        "layer 'up': no bucket holds 8 tokens in 1 segments, which run as they are",
        "no bucket holds 2 rows of 5, which run as they are",
    ]


def test_a_library_says_nothing_on_its_own() -> None:
    logger = logging.getLogger("loraexport_runtime")
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    assert (logger.level, logger.propagate) == (logging.NOTSET, True)


# Loading by type


def test_loaders_by_kind(tenants: Path, model: Path) -> None:
    with lr.load_layers(tenants, threads=1) as layers, lr.load_model(model, threads=1) as whole:
        assert isinstance(layers, lr.LayersSession)
        assert isinstance(whole, lr.ModelSession)
    with lr.load(tenants) as layers, lr.load(model) as whole:
        assert (type(layers), type(whole)) == (lr.LayersSession, lr.ModelSession)
    text = r"its kind is 'layers'; open it with load_layers\(\), or with load\(\), which opens"
    with pytest.raises(lr.ArtifactError, match=text):
        lr.load_model(tenants)
    text = r"its kind is 'model'; open it with load_model\(\), or with load\(\), which op"
    with pytest.raises(lr.ArtifactError, match=text):
        lr.load_layers(model)


def test_loaders_pass_everything_on(tenants: Path, model: Path, tmp_path: Path) -> None:
    for artifact, load in ((tenants, lr.load_layers), (model, lr.load_model)):
        unproven = tmp_path / artifact.name / load.__name__
        shutil.copytree(artifact, unproven)
        edit_manifest(unproven, lambda manifest: manifest["parity"].update(status="deferred"))
        with pytest.raises(lr.ArtifactError, match="parity is 'deferred'"):
            load(unproven)
        load(unproven, ["cpu"], threads=1, allow_unverified=True).close()
        with pytest.raises(lr.ProviderError, match="CUDA graphs were asked for on CPUExecution"):
            load(artifact, cuda_graphs=True)
        with pytest.raises(lr.ArtifactError, match=f"but the pinned digest is {'0' * 64}"):
            load(artifact, digest="0" * 64)


def test_a_layer_that_is_not_there(session: lr.LayersSession) -> None:
    with pytest.raises(lr.UnknownLayerError) as caught:
        session["nope"]
    assert str(caught.value) == "no layer 'nope' in this artifact; it has qkv, up, words"
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, lr.LoraexportError)
    assert session.get("nope") is None
    assert "nope" not in session


# What a run gave goes in again


@pytest.mark.parametrize("has_buckets", [False, True])
def test_ort_values_of_a_model(model: Path, has_buckets: bool) -> None:
    session: Any = open_with_buckets(model) if has_buckets else lr.load_model(model, threads=1)
    if has_buckets:
        session.warm_up([(2, 3)])
    names = ["sql", None]
    wanted = session.run(texts(), names)
    values = {name: ort.OrtValue.ortvalue_from_numpy(one) for name, one in texts().items()}
    found = session.run(values, names)
    assert list(found) == list(wanted)
    for name, value in found.items():
        assert isinstance(value, ort.OrtValue)
        assert value.numpy().tobytes() == wanted[name].tobytes()
    (hidden,) = (found[one.name] for one in session.model.outputs if "sequence" in one.shape)
    with pytest.raises(lr.InputError, match="input_ids is float32; this model takes int64"):
        session.run(values | {"input_ids": hidden}, names)
    flat = ort.OrtValue.ortvalue_from_numpy(np.ones(3, np.int64))
    with pytest.raises(lr.InputError, match=r"input_ids has shape \[3\]; expected \[batch, seq"):
        session.run(values | {"input_ids": flat}, names)
    halves = ort.OrtValue.ortvalue_from_numpy(np.ones((2, 3), np.float16))
    with pytest.raises(lr.InputError, match="attention_mask is float16; this model takes int64"):
        session.run(values | {"attention_mask": halves}, names)


def test_an_ort_value_is_used_as_it_is(
    session: lr.LayersSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session["words"].run(ort.OrtValue.ortvalue_from_numpy(np.arange(4)), [(None, 4)])
    bound: list[int] = []
    bind = ort.IOBinding.bind_ortvalue_input

    def spy(binding: ort.IOBinding, name: str, value: ort.OrtValue) -> None:
        bound.append(value.data_ptr())
        bind(binding, name, value)

    monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", spy)
    session["up"].run(first, [("sql", 4)])
    assert first.data_ptr() in bound
