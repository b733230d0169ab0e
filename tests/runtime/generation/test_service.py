"""A generator in a service: its providers, its end, what it logs."""

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.decoders import FAMILIES, write_decoder
from support.processes import refused_in_a_child
from support.waiting import DEADLINE, num_inside, wait_until

import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.generation.steps.runner import require_cache
from loraexport_runtime.generation.steps.step import Step

Open = Callable[[], lr.TextGenerator]
PROMPTS, NAMES = [[5, 6, 7], [9, 8, 7, 6, 5]], ["first", None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    return build(write_decoder(folder, FAMILIES["Llama"]), folder / "out")[0]


@pytest.fixture
def open_generator(artifact: Path) -> Open:
    return lambda: lr.load_generator(artifact)


# Providers


@pytest.mark.parametrize("name", ["cpu", "CPUExecutionProvider", ("cpu", {})])
def test_names_of_the_cpu(artifact: Path, name: Any) -> None:
    with lr.load_generator(artifact, [name]) as generator:
        assert generator.greedy(PROMPTS, NAMES, 2).shape == (2, 2)
    with lr.load_generator(artifact, providers=("cpu",)) as generator:
        assert set(generator.adapters) == {"first", "second"}


@pytest.mark.parametrize("providers", ["cpu", [], [3], [("cpu", 1)]])
def test_what_providers_must_be(artifact: Path, providers: Any) -> None:
    with pytest.raises(lr.ProviderError, match="providers: expected a "):
        lr.load_generator(artifact, providers)


# The end


def test_a_use_after_close(open_generator: Open) -> None:
    before = threading.enumerate()  # generators of other tests may be open still
    generator = open_generator()
    generator.greedy(PROMPTS, NAMES, 2)
    generator.close()
    generator.close()
    calls: list[Callable[[], object]] = [
        lambda: generator.generate(PROMPTS, adapters=NAMES),
        lambda: generator.stream(PROMPTS, NAMES),
        lambda: generator.greedy(PROMPTS, NAMES, 2),
        lambda: generator.warm_up(1),
        generator.__enter__,
    ]
    text = f"^the generator of {generator.folder} is closed; open the artifact again$"
    for call in calls:
        with pytest.raises(lr.ClosedError, match=text):
            call()
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert not [thread for thread in threads if thread.name.startswith("loraexport-generate")]


def test_an_open_stream_ends(open_generator: Open) -> None:
    """Its next piece is an error; the thread that reads it may be the one that closes."""
    with open_generator() as generator:
        streams = [generator.stream(PROMPTS, NAMES, max_new_tokens=20) for _ in range(2)]
        next(streams[0])
    for stream in streams:
        with pytest.raises(lr.ClosedError, match="is closed; open the artifact again"):
            next(stream)
        assert list(stream) == []


def test_close_waits_for_a_batch(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate and greedy end as they would have; a stream ends after the step that runs."""
    with lr.load_generator(artifact) as whole:
        wanted = whole.generate(PROMPTS, adapters=NAMES, max_new_tokens=6)
        likeliest = whole.greedy(PROMPTS, NAMES, 6)
    generator = lr.load_generator(artifact)
    running, go = threading.Event(), threading.Event()
    run = Step.run

    def hold(step: Step) -> None:
        running.set()
        assert go.wait(DEADLINE)
        run(step)

    monkeypatch.setattr(Step, "run", hold)
    options = {"adapters": NAMES, "max_new_tokens": 6}
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(generator.generate, PROMPTS, **options)
        second = pool.submit(generator.greedy, PROMPTS, NAMES, 6)
        assert running.wait(DEADLINE)
        wait_until(lambda: num_inside(generator._gate) == 2)
        closing = pool.submit(generator.close)
        wait_until(lambda: generator._gate.is_closed)
        with pytest.raises(lr.ClosedError):
            generator.greedy(PROMPTS, NAMES, 1)
        assert not any(one.done() for one in (first, second, closing))
        go.set()
        closing.result(DEADLINE)
        assert first.result(DEADLINE) == wanted
        assert np.array_equal(second.result(DEADLINE), likeliest)


def test_close_gives_memory_up(open_generator: Open) -> None:
    """Of a stream that is still open too, and at once."""
    generator = open_generator()
    stream = generator.stream(PROMPTS, NAMES, max_new_tokens=20)
    generator.greedy(PROMPTS, NAMES, 3)
    next(stream)
    runner: Any = generator.engine._worker._runner
    kept = weakref.ref(runner.cache._memory)
    assert kept() is not None
    gc.collect()
    gc.disable()
    try:
        generator.close()
        assert kept() is None
    finally:
        gc.enable()
    del stream


def test_a_generator_that_is_dropped_is_freed_at_once(open_generator: Open) -> None:
    generator = open_generator()
    generator.greedy(PROMPTS, NAMES, 3)
    assert len(list(generator.stream(PROMPTS, NAMES, max_new_tokens=3)))
    runner: Any = generator.engine._worker._runner
    host = generator.host
    buffers = [buffer.value for buffer in host._stacks.values()]
    objects = (generator, generator.engine, runner, runner._graph.session, host, host.slots)
    kept: list[Any] = [weakref.ref(each) for each in (*objects, *buffers)]
    del runner, host, buffers, objects
    gc.disable()
    try:
        del generator
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_no_call_hangs_in_the_child_of_a_fork(open_generator: Open) -> None:
    """Handles too that were open in the parent: no token comes to them here."""
    with open_generator() as generator:
        engine, steps = generator.engine, generator.engine.length - 8
        handle = engine.submit(lr.GenerationRequest(tokens=PROMPTS[0], max_tokens=steps))
        stream = generator.stream(PROMPTS, NAMES, max_new_tokens=steps)
        next(stream)

        async def read() -> None:
            async for _ in handle:
                pass

        def close() -> None:
            generator.close()
            engine._end()  # what happens to one that is dropped

        calls: dict[str, Callable[[], object]] = {
            "generate": lambda: generator.generate(PROMPTS, NAMES),
            "greedy": lambda: generator.greedy(PROMPTS, NAMES, 2),
            "stream": lambda: next(stream),
            "warm_up": lambda: generator.warm_up(1),
            "adapters": lambda: generator.adapters,
            "with": generator.__enter__,
            "submit": lambda: engine.submit(lr.GenerationRequest(tokens=PROMPTS[0])),
            "stats": engine.stats,
            "result": handle.result,
            "tokens": lambda: list(handle),
            "async tokens": lambda: asyncio.run(read()),
            "listen": lambda: handle.listen(list),
            "fresh": lambda: handle.fresh(0),
            "cancel": handle.cancel,
        }
        locks = (generator.host.slots._lock, handle._changed, engine._worker._news._cond)
        assert refused_in_a_child(calls, close, *locks) == [*calls, "closed"]


def test_close_while_threads_generate(open_generator: Open) -> None:
    """Each call gives all that it would have given, or ClosedError."""
    generator = open_generator()
    wanted = generator.greedy(PROMPTS, NAMES, 4).tolist()
    calls = [0, 0, 0]

    def work(at: int) -> None:
        while True:
            try:
                if at % 2:
                    found = generator.greedy(PROMPTS, NAMES, 4).tolist()
                else:
                    found = [[], []]
                    for piece in generator.stream(PROMPTS, NAMES, max_new_tokens=4):
                        if piece.token is not None:
                            found[piece.row].append(piece.token)
            except lr.ClosedError:
                return
            assert found == wanted
            calls[at] += 1

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, at) for at in range(3)]
        try:
            wait_until(lambda: all(calls) or any(worker.done() for worker in workers))
        finally:
            generator.close()
        for worker in workers:
            worker.result(DEADLINE)
        assert all(calls)


# Words


def test_what_is_logged(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="loraexport_runtime")
    with lr.load_generator(artifact) as generator:
        generator.warm_up(3)
        generator.greedy(PROMPTS, NAMES, 2)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith(f"opened {artifact} (decoder, 2 slots) on CPUExecutionProvider in")
    assert texts[1:] == [f"closed {artifact}"]


def test_a_cache_in_float32_is_not_on_cuda(tmp_path: Path) -> None:
    """There its attention has no kernel, and computes on copies."""
    for device, dtype in ((("cpu", 0), "float32"), (("cuda", 0), "float16")):
        require_cache(tmp_path, device, dtype)
    with pytest.raises(lr.ProviderError, match=r"is the CPU's, .*dtype: float16"):
        require_cache(tmp_path, ("cuda", 0), "float32")
