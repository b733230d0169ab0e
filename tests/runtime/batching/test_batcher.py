"""Requests that are run together give what each gives alone, whoever else comes or fails."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builds import write_model_project
from support.home import Home
from support.processes import refused_in_a_child
from support.waiting import DEADLINE, wait_until

from loraexport_runtime import (
    Batcher,
    ClosedError,
    InputError,
    LayersSession,
    ModelSession,
    QueueFullError,
    RequestTimeoutError,
    UnknownAdapterError,
    load_layers,
    load_model,
)

NAMES = ("sql", None, "chat", "legal")


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    return home.artifact(write_model_project)


@pytest.fixture
def session(artifact: Path) -> Iterator[ModelSession]:
    with load_model(artifact) as opened:
        opened.load_adapter("legal", artifact.parents[1] / "legal")
        yield opened


@pytest.fixture
def layers(tenants: Path) -> Iterator[LayersSession]:
    with load_layers(tenants) as opened:
        yield opened


def text(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One row of the model's inputs."""
    ids = np.random.default_rng([length, seed]).integers(1, 60, length)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def alone(session: ModelSession, row: dict[str, np.ndarray], adapter: Any) -> np.ndarray:
    batch = {name: values[None] for name, values in row.items()}
    y: np.ndarray = session.run(batch, [adapter])["last_hidden_state"][0]
    return y


def result(future: Future[Any]) -> np.ndarray:
    y: np.ndarray = future.result(DEADLINE)["last_hidden_state"]
    return y


class Runs:
    """The batches that a session was asked for; each waits until it is let go."""

    def __init__(self) -> None:
        self.adapters: list[list[Any]] = []
        self.lengths: list[int] = []
        self.gate = threading.Event()


@contextmanager
def held(session: ModelSession, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """A session whose batches wait for `gate`, and are noted."""
    runs, run = Runs(), session.run

    def wait(inputs: Any, adapters: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return run(inputs, adapters)  # what a batcher tries when it is made, or a test
        runs.adapters.append(list(adapters))
        runs.lengths.append(inputs["input_ids"].shape[1])
        assert runs.gate.wait(DEADLINE)
        return run(inputs, adapters)

    monkeypatch.setattr(session, "run", wait)
    try:
        yield runs
    finally:
        runs.gate.set()


@pytest.fixture
def runs(session: ModelSession, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    with held(session, monkeypatch) as noted:
        yield noted


def occupy(batcher: Batcher, runs: Runs) -> Future[Any]:
    """A request that runs, and keeps those behind it waiting."""
    future = batcher.submit(text(4))
    wait_until(lambda: len(runs.adapters) == 1)
    return future


def test_every_request_gives_what_it_gives_alone(session: ModelSession) -> None:
    requests = [(text(2 + seed % 11, seed), NAMES[seed % 4]) for seed in range(60)]
    wanted = [alone(session, row, adapter) for row, adapter in requests]
    futures: dict[int, Future[Any]] = {}
    with Batcher(session, most_rows=8) as batcher:

        def send(first: int) -> None:
            for index in range(first, len(requests), 4):
                futures[index] = batcher.submit(*requests[index])

        threads = [threading.Thread(target=send, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, y in enumerate(wanted):
            assert result(futures[index]).shape == y.shape
            np.testing.assert_allclose(result(futures[index]), y, rtol=0, atol=2e-5)
        stats = batcher.stats()
    assert (stats.requests, stats.queued, stats.failed) == (60, 0, 0)
    assert stats.tokens == sum(len(row["input_ids"]) for row, _ in requests)


def test_segments_of_a_layer(layers: LayersSession) -> None:
    layer, generator = layers["qkv"], np.random.default_rng(0)
    parts = [generator.standard_normal((1 + n % 5, 32)).astype(np.float32) for n in range(30)]
    names = [("sql", None, "chat")[n % 3] for n in range(30)]
    with Batcher(layer) as batcher:
        futures = [batcher.submit(x, name) for x, name in zip(parts, names, strict=True)]
        for x, name, future in zip(parts, names, futures, strict=True):
            wanted = layer.run(x, [(name, len(x))])
            np.testing.assert_allclose(future.result(DEADLINE), wanted, rtol=0, atol=2e-5)
        with pytest.raises(InputError, match=r"a blend; a layer's segment takes one name"):
            batcher.submit(parts[0], {"sql": 1.0})
        with pytest.raises(InputError, match=r"x is of type list; expected a numpy array"):
            batcher.submit(parts[0].tolist())
        with pytest.raises(InputError, match=r"has shape \[2, 31\]"):
            batcher.submit(np.zeros((2, 31), np.float32))


def test_what_comes_during_a_run_goes_together(session: ModelSession, runs: Runs) -> None:
    with Batcher(session) as batcher:
        first = occupy(batcher, runs)
        futures = [batcher.submit(text(6, seed), NAMES[seed % 4]) for seed in range(12)]
        runs.gate.set()
        for future in (first, *futures):
            result(future)
    assert [len(adapters) for adapters in runs.adapters] == [1, 12]


def test_like_lengths_go_together(session: ModelSession, runs: Runs) -> None:
    with Batcher(session) as batcher:
        occupy(batcher, runs)
        futures = [batcher.submit(text(3 if seed % 2 else 20, seed)) for seed in range(16)]
        runs.gate.set()
        for future in futures:
            result(future)
        stats = batcher.stats()
    assert runs.lengths[1:] == [20, 3]
    assert stats.padded_tokens == stats.tokens


def test_a_model_that_padding_would_change(
    session: ModelSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it did not heed its mask: then texts of one length go together only."""
    run = session.run

    def run_unmasked(inputs: Any, adapters: Any) -> Any:
        return run(inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])}, adapters)

    monkeypatch.setattr(session, "run", run_unmasked)
    rows = [text(8 + seed % 2, seed) for seed in range(6)]
    with Batcher(session, delay=0.2) as batcher:
        futures = [batcher.submit(row, "sql") for row in rows]
        for row, future in zip(rows, futures, strict=True):
            wanted = alone(session, row, "sql")
            np.testing.assert_allclose(result(future), wanted, rtol=0, atol=2e-5)
        assert batcher.stats().batches == 2


def test_a_batch_has_bounds(session: ModelSession, runs: Runs) -> None:
    with Batcher(session, most_rows=4, most_tokens=20) as batcher:
        occupy(batcher, runs)
        futures = [batcher.submit(text(4, seed)) for seed in range(9)]
        futures += [batcher.submit(text(8, seed)) for seed in range(2)]
        futures.append(batcher.submit(text(25)))  # longer than a batch may be: alone
        runs.gate.set()
        for future in futures:
            result(future)
    shapes = [(len(rows), length) for rows, length in zip(runs.adapters, runs.lengths, strict=True)]
    assert all(rows * length <= 20 or rows == 1 for rows, length in shapes)
    assert sorted(shapes[1:])[-1][0] == 4
    assert (1, 25) in shapes


def test_a_batch_names_no_more_adapters_than_slots(
    session: ModelSession, artifact: Path, runs: Runs
) -> None:
    for name in ("more", "most"):
        session.load_adapter(name, artifact.parents[1] / "sql")
    names = [*filter(None, NAMES), "more", "most"]
    assert session.manifest.num_slots == 3
    with Batcher(session) as batcher:
        occupy(batcher, runs)
        futures = [batcher.submit(text(5, seed), names[seed % 5]) for seed in range(20)]
        futures += [batcher.submit(text(5, seed)) for seed in range(4)]  # the base is free
        runs.gate.set()
        for future in futures:
            result(future)
    assert all(len({*adapters} - {None}) <= 3 for adapters in runs.adapters)
    assert len(runs.adapters) == 3


def test_who_floods_delays_himself(session: ModelSession, runs: Runs) -> None:
    with Batcher(session, most_rows=4) as batcher:
        occupy(batcher, runs)
        flood = [batcher.submit(text(60, seed), "sql", tenant="loud") for seed in range(40)]
        quiet = [batcher.submit(text(60, seed), "chat", tenant="quiet") for seed in range(2)]
        runs.gate.set()
        for future in (*flood, *quiet):
            result(future)
    # A turn is of 512 tokens, eight of the ten rows of these batches and the next.
    assert sum(adapters.count("chat") for adapters in runs.adapters[1:4]) == 2


def test_a_request_that_fails_fails_alone(session: ModelSession, runs: Runs) -> None:
    with Batcher(session) as batcher:
        occupy(batcher, runs)
        futures = [batcher.submit(text(5, seed), NAMES[seed % 4]) for seed in range(7)]
        wrong = text(5)
        wrong["input_ids"][2] = 10_000
        bad = batcher.submit(wrong, "sql")
        session.load_adapter("gone", session.folder.parents[1] / "sql")
        gone = batcher.submit(text(5), "gone")
        session.unload_adapter("gone")
        runs.gate.set()
        for seed, future in enumerate(futures):
            wanted = alone(session, text(5, seed), NAMES[seed % 4])
            np.testing.assert_allclose(result(future), wanted, rtol=0, atol=2e-5)
        with pytest.raises(InputError, match=r"input_ids\[0, 2\] is 10000"):
            bad.result(DEADLINE)
        with pytest.raises(UnknownAdapterError, match="'gone'"):
            gone.result(DEADLINE)
        assert batcher.stats().failed == 2


def test_what_waits_can_be_cancelled_and_be_late(session: ModelSession, runs: Runs) -> None:
    with Batcher(session) as batcher:
        first = occupy(batcher, runs)
        waiting = batcher.submit(text(5), "sql")
        late = batcher.submit(text(5), "sql", timeout=0.0)
        stays = batcher.submit(text(5), "sql")
        assert waiting.cancel()
        assert not first.cancel(), "it runs"
        runs.gate.set()
        result(stays)
        with pytest.raises(RequestTimeoutError, match="not begun within 0 seconds"):
            late.result(DEADLINE)
        with pytest.raises(CancelledError):
            waiting.result(DEADLINE)
        stats = batcher.stats()
    assert (stats.cancelled, stats.late, stats.requests) == (1, 1, 2)


def test_a_full_queue_refuses(session: ModelSession, runs: Runs) -> None:
    with Batcher(session, most_queued=3, most_queued_tokens=100) as batcher:
        occupy(batcher, runs)
        futures = [batcher.submit(text(5)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="more than 100"):
            batcher.submit(text(91))
        futures.append(batcher.submit(text(5)))
        with pytest.raises(QueueFullError, match="3 requests wait, and 3 may"):
            batcher.submit(text(5))
        runs.gate.set()
        for future in futures:
            result(future)


def test_what_a_request_must_be(session: ModelSession) -> None:
    row = text(5)
    with Batcher(session) as batcher:
        with pytest.raises(InputError, match=r"inputs are \['input_ids'\]; this model takes"):
            batcher.submit({"input_ids": row["input_ids"]})
        with pytest.raises(InputError, match=r"shape \[1, 5\]; expected \[sequence\]"):
            batcher.submit({name: values[None] for name, values in row.items()})
        with pytest.raises(InputError, match=r"shape \[4\]; expected \[5\]"):
            batcher.submit(row | {"attention_mask": np.ones(4, np.int64)})
        with pytest.raises(InputError, match="input_ids is int32; this model takes int64"):
            batcher.submit(row | {"input_ids": row["input_ids"].astype(np.int32)})
        with pytest.raises(UnknownAdapterError):
            batcher.submit(row, "nobody")
        with pytest.raises(InputError, match="timeout is -1"):
            batcher.submit(row, timeout=-1)
        with pytest.raises(InputError, match=r"4 adapters, and the artifact 3 slots"):
            batcher.submit(row, dict.fromkeys("abcd", 0.1))
    with pytest.raises(InputError, match="most_rows is 0"):
        Batcher(session, most_rows=0)
    with pytest.raises(InputError, match="delay is -1"):
        Batcher(session, delay=-1)


def test_inputs_may_be_written_over(session: ModelSession, runs: Runs) -> None:
    with Batcher(session) as batcher:
        occupy(batcher, runs)
        row = text(5)
        future = batcher.submit(row, "sql")
        row["input_ids"][:] = 1
        runs.gate.set()
        wanted = alone(session, text(5), "sql")
        np.testing.assert_allclose(result(future), wanted, rtol=0, atol=2e-5)


def test_a_delay_lets_more_come(session: ModelSession) -> None:
    with Batcher(session, delay=0.2) as batcher:
        for future in [batcher.submit(text(5, seed)) for seed in range(3)]:
            result(future)
        assert batcher.stats().batches == 1


def test_asyncio(session: ModelSession, runs: Runs) -> None:
    async def ask(batcher: Batcher) -> Any:
        first = asyncio.create_task(batcher.asubmit(text(4)))
        while not runs.adapters:
            await asyncio.sleep(0.001)
        tasks = [asyncio.create_task(batcher.asubmit(text(5), name)) for name in NAMES]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        runs.gate.set()
        return await asyncio.gather(first, *tasks, return_exceptions=True)

    with Batcher(session) as batcher:
        _, cancelled, *others = asyncio.run(ask(batcher))
        assert batcher.stats().cancelled == 1
    assert isinstance(cancelled, asyncio.CancelledError)
    for name, outputs in zip(NAMES[1:], others, strict=True):
        wanted = alone(session, text(5), name)
        np.testing.assert_allclose(outputs["last_hidden_state"], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cancel_queued", [False, True])
def test_close(session: ModelSession, runs: Runs, cancel_queued: bool) -> None:
    batcher = Batcher(session)
    first = occupy(batcher, runs)
    futures = [batcher.submit(text(5, seed)) for seed in range(3)]
    threading.Timer(0.05, runs.gate.set).start()
    batcher.close(cancel_queued=cancel_queued)
    batcher.close()
    result(first)
    for future in futures:
        if cancel_queued:
            with pytest.raises(ClosedError, match="closed before the request was run"):
                future.result(0)
        else:
            future.result(0)
    with pytest.raises(ClosedError, match="make another one"):
        batcher.submit(text(5))


def test_a_closed_session(session: ModelSession) -> None:
    with Batcher(session) as batcher:
        session.close()
        with pytest.raises(ClosedError):
            batcher.submit(text(5)).result(DEADLINE)


def test_a_thread_that_fails_refuses_what_waits(
    session: ModelSession, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = Batcher(session)
    occupy(batcher, runs)
    waiting = batcher.submit(text(5))

    def fail() -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(batcher, "_drop", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    runs.gate.set()
    with pytest.raises(MemoryError, match="no room"):
        waiting.result(DEADLINE)
    with pytest.raises(ClosedError):
        batcher.submit(text(5))
    batcher.close()


def test_no_call_hangs_in_the_child_of_a_fork(session: ModelSession) -> None:
    with Batcher(session) as batcher:
        calls = {
            "submit": lambda: batcher.submit(text(5), "sql"),
            "submit to the base": lambda: batcher.submit(text(5)),
            "asubmit": lambda: asyncio.run(batcher.asubmit(text(5))),
            "stats": batcher.stats,
        }
        locks = session.host.slots._lock, batcher._queue._lock, batcher._news._cond
        said = refused_in_a_child(calls, batcher.close, *locks)
        assert said == [*calls, "closed"]
        assert result(batcher.submit(text(5), "sql")).shape == (5, 32)


def test_batches_of_few_widths(session: ModelSession) -> None:
    """As on CUDA: filled up to a multiple of some tokens, as far as the model's positions go."""
    with Batcher(session) as batcher:
        joint: Any = batcher._joint
        joint._step = 8
        longest = session.model.facts.positions
        assert longest is not None
        assert [joint.padded([n, 2]) for n in (1, 8, 9, longest - 1)] == [16, 16, 32, 2 * longest]
        rows = [(text(5), "sql"), (text(longest - 1), "chat"), (text(9), None)]
        found = [batcher.submit(row, name).result(DEADLINE) for row, name in rows]
    for (row, name), outputs in zip(rows, found, strict=True):
        alone = session.run({key: value[None] for key, value in row.items()}, [name])
        for key, value in outputs.items():
            assert np.allclose(value, alone[key][0], rtol=1e-4, atol=1e-5)
