"""The engine: requests join and leave a running batch, and each gives what it gives alone."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.decoders import (
    CONTEXT,
    VOCABULARY,
    make_prompts,
    make_remote,
    open_engine,
    write_tenants,
)
from support.home import Home
from support.waiting import DEADLINE, wait_until

import loraexport_runtime as lr
from loraexport_runtime.contract.kinds import GOES_ON
from loraexport_runtime.generation.engine import GenerationEngine
from loraexport_runtime.generation.handle import GenerationHandle
from loraexport_runtime.generation.loop import reading
from loraexport_runtime.generation.loop import worker as working
from loraexport_runtime.generation.request import GenerationRequest
from loraexport_runtime.generation.steps import runner as running
from loraexport_runtime.generation.steps.prompts import PromptGraph
from loraexport_runtime.generation.steps.step import Step

NAMES = (None, "first", "second")


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    return home.artifact(write_tenants)


@pytest.fixture(params=["cpu", "remote"])
def engine(
    artifact: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[GenerationEngine]:
    """Also as on a device: prompts are read together, and tokens told beside the next step."""
    if request.param == "remote":
        make_remote(monkeypatch)
    with open_engine(artifact, rows=4, quota=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def graph(artifact: Path) -> ort.InferenceSession:
    """The graph as it was built."""
    return ort.InferenceSession(
        artifact / "generator/model.onnx", providers=["CPUExecutionProvider"]
    )


def send(engine: GenerationEngine, tokens: list[int], **options: Any) -> GenerationHandle:
    options = {"max_tokens": 8, "ignore_eos": True} | options
    return engine.submit(GenerationRequest(tokens=tokens, **options))


def tokens_of(handle: GenerationHandle) -> list[int]:
    return [one.token for one in handle.result(DEADLINE).answers[0].tokens]


def all_logits(graph: ort.InferenceSession, tokens: list[int], slot: int) -> np.ndarray:
    """float32 [n, vocabulary], by one run over all of them."""
    ids = np.array([tokens])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "adapter_ids": np.array([slot])}
    for one in graph.get_inputs():
        if one.name.startswith("past_key_values"):
            feeds[one.name] = np.zeros((1, one.shape[1], 0, 16), np.float32)
    logits: np.ndarray = graph.run(["logits"], feeds)[0][0]
    return logits


class Held:
    """Steps of an engine that wait, one after the other, until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._gate = threading.Semaphore(0)
        self.num = 0
        run = Step.run

        def hold(step: Step) -> None:
            self.num += 1
            assert self._gate.acquire(timeout=DEADLINE)
            run(step)

        monkeypatch.setattr(Step, "run", hold)

    def let_go(self, num: int = 10_000) -> None:
        self._gate.release(num)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, engine: GenerationEngine) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.let_go()


# What a request gives


def test_greedy_tokens_are_the_likeliest(
    engine: GenerationEngine, graph: ort.InferenceSession
) -> None:
    """Of rows of different lengths, to the last place of one of them."""
    prompts = make_prompts(5, 1, 33, CONTEXT - 30, 17, 64)
    sent = [
        send(engine, prompt, adapter=NAMES[index % 3], max_tokens=30)
        for index, prompt in enumerate(prompts)
    ]
    for index, (prompt, handle) in enumerate(zip(prompts, sent, strict=True)):
        found = tokens_of(handle)
        assert len(found) == 30
        slot = engine.adapters.get(NAMES[index % 3] or "", 0)
        logits = all_logits(graph, prompt + found, slot)[len(prompt) - 1 : -1]
        assert logits.argmax(axis=1).tolist() == found


def test_a_row_that_joins_is_looked_at(engine: GenerationEngine, held: Held) -> None:
    """A row whose logits the host needs joins rows that take the likeliest tokens, whose steps were
    not looked at so far."""
    held.let_go()
    prompts = make_prompts(20, 9)
    options: tuple[dict[str, Any], ...] = ({"max_tokens": 90}, {"repetition_penalty": 1.5})
    pairs = list(zip(prompts, options, strict=True))
    alone = [tokens_of(send(engine, prompt, **more)) for prompt, more in pairs]
    first = send(engine, prompts[0], **options[0])
    before = held.num
    wait_until(lambda: held.num > before + 4)
    second = send(engine, prompts[1], **options[1])
    assert [tokens_of(first), tokens_of(second)] == alone


def test_a_row_does_not_depend_on_the_others(engine: GenerationEngine) -> None:
    """Bit for bit, as its logprobs tell: alone, and among others that come and go."""
    prompts = make_prompts(20, 33, 2, 64, 9, 41, 5, 3)
    options: dict[str, Any] = {"logprobs": 3, "prompt_logprobs": 1, "max_tokens": 12}
    alone = [
        send(engine, prompt, adapter=NAMES[index % 3], **options).result(DEADLINE)
        for index, prompt in enumerate(prompts)
    ]
    sent = [
        send(engine, prompt, adapter=NAMES[index % 3], **options)
        for index, prompt in enumerate(prompts)
    ]
    assert [handle.result(DEADLINE) for handle in sent] == alone


def test_rows_change_hands_while_others_decode(engine: GenerationEngine) -> None:
    """More requests than rows, which end at different steps."""
    sizes, most = (5, 20, 9, 33, 2, 16, 12, 40, 7, 28), (2, 5, 9, 14, 3, 30)
    asked = [
        (prompt, NAMES[at % 3], most[at % len(most)])
        for at, prompt in enumerate(make_prompts(*sizes, *sizes, *sizes))
    ]

    def ask(prompt: list[int], name: str | None, num: int) -> GenerationHandle:
        return send(engine, prompt, adapter=name, max_tokens=num)

    alone = [tokens_of(ask(*one)) for one in asked]
    assert [tokens_of(handle) for handle in [ask(*one) for one in asked]] == alone


def test_prompts_that_are_read_together(artifact: Path) -> None:
    """As on a device: whole prompts, padded, in one run."""
    prompts = [*make_prompts(9, 12, 10, 16), *make_prompts(5, 31)]
    with open_engine(artifact, rows=4, quota=64) as engine:
        wanted = [tokens_of(send(engine, prompt, adapter="first")) for prompt in prompts]
        chunks = engine.stats().chunks
        engine._worker._prompts._joined = engine._worker._runner.prompts.joined_tokens
        gate = threading.Event()
        engine._worker._warm.append((1, _Waiter(gate)))  # type: ignore[arg-type]
        sent = [send(engine, [*prompt], adapter="first") for prompt in prompts]
        gate.set()
        assert [tokens_of(handle) for handle in sent] == wanted
        assert engine.stats().chunks - chunks < len(prompts)


def test_prompts_of_a_captured_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured on CUDA: prompts filled up beside a row that has none, and copied."""
    make_remote(monkeypatch)
    monkeypatch.setattr(PromptGraph, "release", lambda graph: None)  # CUDA's
    prompts = make_prompts(9, 31, 20)
    with open_engine(artifact, rows=4, quota=256) as engine:
        wanted = [
            tokens_of(send(engine, prompt, adapter=name))
            for prompt, name in zip(prompts, NAMES, strict=True)
        ]
        graphs = engine._worker._runner.prompts
        graphs.shapes = [(1, 64), (4, 64)]
        for num in range(1, 3):
            gate = threading.Event()
            engine._worker._warm.append((1, _Waiter(gate)))  # type: ignore[arg-type]
            sent = [
                send(engine, prompt, adapter=name)
                for prompt, name in zip(prompts, NAMES, strict=True)
            ]
            gate.set()
            assert [tokens_of(handle) for handle in sent] == wanted
            assert engine.stats().chunks == len(prompts) + num


def test_a_free_row_waits_for_others(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, where more requests wait than there are free rows: for a bounded time."""
    make_remote(monkeypatch)
    with open_engine(artifact, rows=12, quota=32) as engine:
        runner = engine._worker._runner
        events: list[str] = []
        step, read = runner.step, runner.read

        def record_step(*arguments: Any) -> None:
            events.append("step")
            step(*arguments)

        def record_read(rows: Any, *arguments: Any) -> Any:
            events.extend(f"row {row}" for row in rows)
            return read(rows, *arguments)

        monkeypatch.setattr(runner, "step", record_step)
        monkeypatch.setattr(runner, "read", record_read)
        # Row 0 is free after 2 steps, and one more after 5, or none for long.
        for second, waiting, first, last in ((6, 1, 2, 4), (6, 2, 5, 8), (60, 3, 24, 32)):
            events.clear()
            most = [3, second, *[60] * 10, *[40] * waiting]
            requests = [
                GenerationRequest(tokens=[5 + at, 7], max_tokens=num, ignore_eos=True)
                for at, num in enumerate(most)
            ]
            for handle in engine.submit_all(requests):
                handle.result(DEADLINE)
            again = events.index("row 0", events.index("step"))
            assert first <= events[:again].count("step") <= last, (second, waiting)


class _Waiter:
    """Stands for the end of a warm-up, and keeps the thread there."""

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    def set(self) -> None:
        assert self._gate.wait(DEADLINE)


def test_prompts_of_fixed_sizes(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured on CUDA: prompts filled up, read into a row of their own, and copied."""
    prompts = make_prompts(1, 5, 32, 33, 70, 5)
    names = [None, "first", "second", "first", None, "second"]
    with open_engine(artifact, rows=4) as engine:
        wanted = [
            send(engine, prompt, adapter=name, logprobs=2)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        texts = [handle.result(DEADLINE).answers[0].tokens for handle in wanted]
    with open_engine(artifact, rows=4) as engine:
        graphs = engine._worker._runner.prompts
        monkeypatch.setattr(PromptGraph, "release", lambda graph: None)  # CUDA's
        graphs.shapes = [(1, 32), (1, 64)]
        for (prompt, name), text in zip(zip(prompts, names, strict=True), texts, strict=True):
            found = send(engine, prompt, adapter=name, logprobs=2).result(DEADLINE).answers[0]
            assert [one.token for one in found.tokens] == [one.token for one in text]
            likeliest = [[one.likeliest for one in part] for part in (found.tokens, text)]
            assert np.allclose(*likeliest, rtol=1e-4, atol=1e-5)
        assert set(graphs._made) == {(1, 32), (1, 64)}, "70 tokens are read as they are"


def test_logprobs(engine: GenerationEngine, graph: ort.InferenceSession) -> None:
    prompt = make_prompts(40)[0]
    request = send(engine, prompt, adapter="second", logprobs=4, prompt_logprobs=2, max_tokens=5)
    done = request.result(DEADLINE)
    found = [one.token for one in done.answers[0].tokens]
    logits = all_logits(graph, prompt + found, engine.adapters["second"]).astype(np.float64)
    shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert [one.token for one in done.prompt_logprobs] == prompt[1:]
    for at, told in enumerate((*done.prompt_logprobs, *done.answers[0].tokens)):
        assert told.logprob == pytest.approx(shares[at, told.token], abs=1e-3)
        assert told.likeliest[0][0] == shares[at].argmax()
        assert len(told.likeliest) == (2 if at < len(prompt) - 1 else 4)
        values = [value for _, value in told.likeliest]
        assert values == sorted(values, reverse=True)
    plain = send(engine, prompt, adapter="second", max_tokens=5).result(DEADLINE)
    assert plain.prompt_logprobs == ()
    assert [(one.token, one.logprob, one.likeliest) for one in plain.answers[0].tokens] == [
        (token, None, ()) for token in found
    ]


def test_several_answers(engine: GenerationEngine) -> None:
    prompt = make_prompts(30)[0]
    options: dict[str, Any] = {"temperature": 3.0, "adapter": "first"}
    done = send(engine, prompt, n=6, seed=3, **options).result(DEADLINE)
    answers = [tuple(one.token for one in answer.tokens) for answer in done.answers]
    assert len(set(answers)) == 6
    again = send(engine, prompt, n=6, seed=3, **options).result(DEADLINE)
    assert again.answers == done.answers
    assert engine.stats().prefix_hits >= 5  # the prompt is read once
    others = send(engine, prompt, n=2, seed=4, **options).result(DEADLINE)
    assert {tuple(one.token for one in answer.tokens) for answer in others.answers}.isdisjoint(
        answers
    )


def test_drawn_rows_beside_greedy_ones(engine: GenerationEngine) -> None:
    prompts = make_prompts(7, 12, 30, 4)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 5.0, "seed": 3},
        {"temperature": 5.0, "seed": 3, "top_k": 0, "repetition_penalty": 1.3},
        {"temperature": 0.9, "seed": 1, "top_k": 7, "top_p": 0.8, "min_p": 0.05},
    ]
    alone = [
        tokens_of(send(engine, prompt, adapter="first", **kind))
        for prompt, kind in zip(prompts, kinds, strict=True)
    ]
    sent = [
        send(engine, prompt, adapter="first", **kind)
        for prompt, kind in zip(prompts, kinds, strict=True)
    ]
    assert [tokens_of(handle) for handle in sent] == alone


def test_what_ends_an_answer(engine: GenerationEngine) -> None:
    prompt = make_prompts(9)[0]
    whole = tokens_of(send(engine, prompt, max_tokens=12))
    stop = next(token for token in whole if token not in whole[: whole.index(token)])
    at = whole.index(stop)
    done = send(engine, prompt, max_tokens=12, stop_token_ids=[stop]).result(DEADLINE).answers[0]
    assert ([one.token for one in done.tokens], done.finish_reason) == (whole[:at], "stop")
    late = send(engine, prompt, max_tokens=12, stop_token_ids=[stop], min_tokens=at + 1)
    found = tokens_of(late)
    assert found[:at] == whole[:at]
    assert found[at] != stop
    assert send(engine, prompt, max_tokens=3).result(DEADLINE).answers[0].finish_reason == "length"


def test_a_prompt_of_one_token_and_one_new_token(engine: GenerationEngine) -> None:
    done = send(engine, [5], max_tokens=1).result(DEADLINE)
    assert (len(done.answers[0].tokens), done.prompt_tokens) == (1, 1)


# Iterating, cancelling, and time


def test_tokens_come_one_by_one(engine: GenerationEngine, held: Held) -> None:
    handle = send(engine, make_prompts(9)[0])
    tokens = iter(handle)
    first = next(tokens)
    held.let_go(1)
    second = next(tokens)
    assert not handle.is_done
    held.let_go()
    assert [first, second, *tokens] == list(handle) == list(handle.result().answers[0].tokens)


def test_asyncio(engine: GenerationEngine) -> None:
    async def read(prompt: list[int]) -> list[int]:
        return [one.token async for one in send(engine, prompt)]

    async def run() -> list[Any]:
        prompts = make_prompts(9, 30, 5)
        together = await asyncio.gather(*(read(prompt) for prompt in prompts))
        whole = await send(engine, prompts[0])
        return [*together, [one.token for one in whole.answers[0].tokens]]

    found = asyncio.run(run())
    assert found == [tokens_of(send(engine, prompt)) for prompt in make_prompts(9, 30, 5)] + [
        found[0]
    ]


def test_cancel(engine: GenerationEngine, held: Held) -> None:
    handle = send(engine, make_prompts(9)[0], max_tokens=100)
    next(iter(handle))
    queued = [send(engine, prompt) for prompt in make_prompts(*[4] * 6)]
    handle.cancel()
    queued[-1].cancel()
    held.let_go()
    done = handle.result(DEADLINE).answers[0]
    assert done.finish_reason == "cancelled"
    assert 1 <= len(done.tokens) <= 1 + working.STEPS
    assert queued[-1].result(DEADLINE).answers[0].finish_reason == "cancelled"
    assert all(len(tokens_of(one)) == 8 for one in queued[:-1])
    handle.cancel()
    wait_until(lambda: engine.stats().running == 0)
    assert (engine.stats().cancelled, engine.stats().finished) == (2, 5)


def test_a_request_whose_time_is_over(
    engine: GenerationEngine, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = send(engine, make_prompts(9)[0], max_tokens=100, timeout=1000.5)
    next(iter(late))
    others = [send(engine, prompt, max_tokens=4) for prompt in make_prompts(5, 6, 7)]
    queued = send(engine, make_prompts(9)[0], timeout=1000)
    now = time.monotonic
    monkeypatch.setattr(working.time, "monotonic", lambda: now() + 2000)
    held.let_go()
    text = r"was not done within 1000.5 seconds; its tokens so far are there"
    with pytest.raises(lr.RequestTimeoutError, match=text):
        late.result()
    with pytest.raises(TimeoutError):
        queued.result()
    tokens = iter(late)
    next(tokens)
    with pytest.raises(lr.RequestTimeoutError):
        list(tokens)
    assert all(len(one.result().answers[0].tokens) == 4 for one in others)


def test_a_wait_that_is_over_ends_no_request(engine: GenerationEngine, held: Held) -> None:
    handle = send(engine, make_prompts(9)[0])
    with pytest.raises(TimeoutError, match=r"is not done after 0\.01 seconds; it goes on"):
        handle.result(0.01)
    held.let_go()
    assert len(tokens_of(handle)) == 8


def test_the_queue_is_bounded(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with open_engine(artifact, rows=1, most_queued=3, most_queued_tokens=60) as engine:
        first = send(engine, [5, 6, 7])
        wait_until(lambda: engine.stats().running == 1)
        waiting = [send(engine, [5, 6], max_tokens=8) for _ in range(3)]
        with pytest.raises(lr.QueueFullError, match="3 requests wait, and 3 may"):
            send(engine, [5])
        waiting.pop().cancel()
        held.let_go(working.STEPS)
        wait_until(lambda: engine.stats().queued == 2)
        assert engine.stats().queued_tokens == 20
        with pytest.raises(lr.QueueFullError, match="have 20 tokens, and with 41 more"):
            send(engine, [5], max_tokens=40)
        held.let_go()
        assert all(len(tokens_of(one)) == 8 for one in (first, *waiting))


def test_a_short_prompt_goes_before_a_long_ones_next_chunk(artifact: Path) -> None:
    with open_engine(artifact, rows=3, quota=16) as engine:
        gate = threading.Event()
        engine._worker._warm.append((1, _Waiter(gate)))  # type: ignore[arg-type]
        long, short = send(engine, make_prompts(100)[0]), send(engine, [5, 6, 7])
        order: list[str] = []
        long.listen(lambda: order.append("long"))
        short.listen(lambda: order.append("short"))
        del order[:]
        gate.set()
        tokens_of(long)
        assert order[0] == "short"


@pytest.mark.parametrize(
    ("least", "first"), [(None, ["3", "4", "5", "6", "9"]), (8, ["3", "4", "5", "6"])]
)
def test_a_round_reads_prompts_up_to_its_quota(
    least: int | None, first: list[str], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four runs at most where a run counts as a fourth of it at least, as on a device."""
    monkeypatch.setattr(reading, "MOST_QUOTAS", 1)  # as where most rows decode
    with open_engine(artifact, rows=8, quota=32) as engine:
        if least is not None:
            engine._worker._prompts._least = least
        runner = engine._worker._runner
        step, read = runner.step, runner.read
        events: list[str | int] = []

        def record_step(*arguments: Any) -> None:
            events.append("step")
            step(*arguments)

        def record_read(rows: Any, prompts: Any, *arguments: Any) -> Any:
            events.append(len(prompts[0]))
            return read(rows, prompts, *arguments)

        monkeypatch.setattr(runner, "step", record_step)
        monkeypatch.setattr(runner, "read", record_read)
        sizes = (3, 4, 5, 6, 9, 20, 12, 70)
        requests = [
            GenerationRequest(tokens=prompt, max_tokens=30, ignore_eos=True)
            for prompt in make_prompts(*sizes)
        ]
        for handle in engine.submit_all(requests):
            handle.result(DEADLINE)
    rounds = "".join(f" {event}" for event in events).split("step")
    read_first = [part.split() for part in rounds if part.strip()]
    assert read_first[0] == first
    assert all(sum(map(int, part)) <= 32 for part in read_first)
    assert sorted(int(size) for part in read_first for size in part) == sorted(
        [3, 4, 5, 6, 9, 20, 12, 32, 32, 6]
    )


def test_who_comes_to_a_free_row_waits_for_two_steps(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most, of the four of a round."""
    runner = engine._worker._runner
    step, read = runner.step, runner.read
    events: list[str] = []
    later: list[GenerationHandle] = []

    def record_step(*arguments: Any) -> None:
        events.append("step")
        if events.count("step") in (5, 16, 27):
            events.append("comes")
            later.append(send(engine, [5, 6, 7], max_tokens=40))
        step(*arguments)

    def record_read(*arguments: Any) -> Any:
        events.append("read")
        return read(*arguments)

    monkeypatch.setattr(runner, "step", record_step)
    monkeypatch.setattr(runner, "read", record_read)
    send(engine, [5, 6], max_tokens=60).result(DEADLINE)
    for handle in later:
        handle.result(DEADLINE)
    for at, event in enumerate(events):
        if event == "comes":
            assert events.index("read", at) - at <= 2, events


def test_prompts_that_keep_coming_do_not_starve_a_long_one(artifact: Path) -> None:
    with open_engine(artifact, rows=2, quota=16) as engine:
        long = send(engine, make_prompts(100)[0], max_tokens=1)
        shorts = [send(engine, [5, 6, 7], max_tokens=1) for _ in range(60)]
        for handle in (long, *shorts):
            handle.result(DEADLINE)
        assert engine.stats().finished == 61


# Adapters


def test_more_adapters_than_slots(engine: GenerationEngine, artifact: Path) -> None:
    folder = artifact.parents[1]
    for index in range(4):
        engine.load_adapter(f"m{index}", folder / f"more-{index}")
    names = ["first", "second", "m0", "m1", "m2", "m3", None]
    prompt = make_prompts(20)[0]
    alone = [tokens_of(send(engine, prompt, adapter=name)) for name in names]
    assert len({tuple(tokens) for tokens in alone}) == len(names)
    sent = [send(engine, prompt, adapter=name) for name in names * 3]
    assert [tokens_of(handle) for handle in sent] == alone * 3
    assert engine.stats().slots_held == 2
    assert engine.stats().pages > 6


def test_a_replaced_adapter(engine: GenerationEngine, artifact: Path, held: Held) -> None:
    """The answer that runs ends with the old one, and the next has the new one."""
    prompt = make_prompts(20)[0]
    old = send(engine, prompt, adapter="first", max_tokens=20)
    next(iter(old))
    before = engine.adapters["first"]
    engine.load_adapter("first", artifact.parents[1] / "more-0", timeout=DEADLINE)
    assert engine.adapters["first"] != before
    new = send(engine, prompt, adapter="first", max_tokens=20)
    held.let_go()
    found = [tokens_of(old), tokens_of(new)]
    engine.load_adapter("first")
    assert tokens_of(send(engine, prompt, adapter="first", max_tokens=20)) == found[0]
    engine.load_adapter("x", artifact.parents[1] / "more-0")
    assert tokens_of(send(engine, prompt, adapter="x", max_tokens=20)) == found[1] != found[0]


def test_an_unloaded_adapter(engine: GenerationEngine, held: Held) -> None:
    prompt = make_prompts(20)[0]
    old = send(engine, prompt, adapter="first")
    next(iter(old))
    engine.unload_adapter("first")
    with pytest.raises(lr.UnknownAdapterError, match="'first' is not loaded"):
        send(engine, prompt, adapter="first")
    held.let_go()
    found = tokens_of(old)
    engine.load_adapter("first")
    assert tokens_of(send(engine, prompt, adapter="first")) == found


def test_an_adapter_unloaded_while_its_request_waits(engine: GenerationEngine, held: Held) -> None:
    busy = [send(engine, prompt) for prompt in make_prompts(4, 5, 6, 7)]
    waiting = send(engine, make_prompts(9)[0], adapter="first")
    engine.unload_adapter("first")
    held.let_go()
    with pytest.raises(lr.UnknownAdapterError, match="'first' is not loaded"):
        waiting.result(DEADLINE)
    assert all(len(tokens_of(one)) == 8 for one in busy)


def test_what_lacks_a_slot_blocks_nobody(
    engine: GenerationEngine, artifact: Path, held: Held
) -> None:
    """Both slots are in use; whoever needs a third waits, and the others go on."""
    engine.load_adapter("third", artifact.parents[1] / "more-0")
    engine.pin("second")
    engine.pin("third")
    with pytest.raises(lr.SlotsExceededError, match="2 of 2 slots are kept for pinned adapters"):
        send(engine, [5, 6], adapter="first")
    engine.unpin("second")
    running_ = send(engine, make_prompts(9)[0], adapter="second", max_tokens=20)
    next(iter(running_))
    blocked = send(engine, make_prompts(9)[0], adapter="first")
    behind = send(engine, make_prompts(5)[0], adapter="third", max_tokens=4)
    base = send(engine, make_prompts(5)[0], max_tokens=4)
    held.let_go(12)
    assert [len(tokens_of(one)) for one in (behind, base)] == [4, 4]
    assert not blocked.is_done
    held.let_go()
    assert len(tokens_of(blocked)) == 8


def test_a_blend_is_refused(engine: GenerationEngine) -> None:
    with pytest.raises(lr.InputError, match="adapter is a blend, which this graph has no input"):
        send(engine, [5], adapter={"first": 1.0})


# What rows still hold


def test_a_chats_second_turn_reads_only_what_is_new(engine: GenerationEngine) -> None:
    prompt = make_prompts(40)[0]
    first = tokens_of(send(engine, prompt, adapter="first"))
    turn = [*prompt, *first, 7, 8, 9]
    with_cache = send(engine, turn, adapter="first").result(DEADLINE)
    assert with_cache.reused_tokens == len(prompt) + len(first) - 1  # the last one was not read
    fresh = send(engine, turn, adapter="first", prompt_logprobs=0).result(DEADLINE)
    assert (fresh.reused_tokens, fresh.answers) == (0, with_cache.answers)
    stats = engine.stats()
    assert (stats.prefix_hits, stats.prefix_tokens) == (1, with_cache.reused_tokens)


def test_a_prefix_is_of_an_adapters_content_and_not_its_name(
    engine: GenerationEngine, artifact: Path
) -> None:
    prompt, folder = make_prompts(40)[0], artifact.parents[1]
    tokens_of(send(engine, prompt, adapter="first"))
    for name in (None, "second"):
        assert send(engine, prompt, adapter=name).result(DEADLINE).reused_tokens == 0
    engine.load_adapter("first", folder / "more-0")
    assert send(engine, prompt, adapter="first").result(DEADLINE).reused_tokens == 0
    engine.load_adapter("first", scale=2.0)
    assert send(engine, prompt, adapter="first").result(DEADLINE).reused_tokens == 0
    engine.load_adapter("again", folder / "more-0")
    assert send(engine, prompt, adapter="again").result(DEADLINE).reused_tokens == 38


def test_texts_of_idle_rows_move_away_from_the_first_rows(engine: GenerationEngine) -> None:
    """So that one request alone makes steps of the fewest rows, and old texts are still there."""
    prompts = make_prompts(40, 41, 42)
    for prompt in prompts:
        tokens_of(send(engine, prompt))
    stats = engine.stats()
    assert stats.step_rows == stats.steps
    assert set(engine._worker._runner._steps) == {2}
    for prompt in prompts:
        assert send(engine, prompt).result(DEADLINE).reused_tokens == len(prompt) - 2
    assert set(engine._worker._runner._steps) == {2}


def test_no_number_left_by_another_text_reaches_a_row(engine: GenerationEngine) -> None:
    prompts = make_prompts(40, 41, 5)
    wanted = [tokens_of(send(engine, prompt)) for prompt in prompts]
    worker = engine._worker
    wait_until(lambda: engine.stats().running == 0)
    for row in worker._rows.rows:
        row.num_read, row.num_touched = 0, engine.length
    memory: Any = worker._runner.cache._memory
    memory._array[:] = np.nan
    assert [tokens_of(send(engine, prompt)) for prompt in prompts] == wanted
    for row in worker._rows.rows:  # behind what a row keeps, too
        memory._array[:, row.index, :, row.num_read :] = np.nan
        row.num_touched = engine.length
    again = send(engine, prompts[0]).result(DEADLINE)
    assert again.reused_tokens == 38
    assert [one.token for one in again.answers[0].tokens] == wanted[0]


def test_nothing_of_another_text_is_left_in_a_row(engine: GenerationEngine) -> None:
    """Neither behind a short prompt, nor behind a prefix that both have."""
    worker, long = engine._worker, make_prompts(60)[0]
    tokens_of(send(engine, long, adapter="first"))
    tokens_of(send(engine, make_prompts(5)[0], max_tokens=1, adapter="second"))
    shared = send(engine, [*long[:30], 7, 8], max_tokens=1, adapter="first").result(DEADLINE)
    assert shared.reused_tokens == 30
    wait_until(lambda: engine.stats().running == 0)
    kept = [row for row in worker._rows.rows if row.is_kept]
    memory: Any = worker._runner.cache._memory
    assert {row.num_read for row in kept} >= {5, 32}
    for row in kept:
        array = memory._array[:, row.index]  # [layers' keys and values, heads, length, size]
        assert np.abs(array[:, :, : row.num_read]).min(axis=(1, 3)).all()
        assert not array[:, :, row.num_read + 1 :].any()  # the next place is written by steps


# Faults


def test_a_step_that_fails_fails_its_rows_only(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(20, 9, 5)
    wanted = [tokens_of(send(engine, prompt, adapter="first")) for prompt in prompts]
    run, failures = Step.run, [RuntimeError("out of memory")]

    def fail(step: Step) -> None:
        if failures:
            raise failures.pop()
        run(step)

    monkeypatch.setattr(Step, "run", fail)
    with pytest.raises(lr.StepError, match=r"failed in the step .* was in: out of memory"):
        send(engine, prompts[0], adapter="first").result(DEADLINE)
    assert engine.stats().failed == 1
    assert [tokens_of(send(engine, prompt, adapter="first")) for prompt in prompts] == wanted
    assert engine.host.slots._table._claims == set()


def test_a_prompt_that_fails(engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    read, failures = running.read_prompts, [RuntimeError("out of memory")]

    def fail(*arguments: Any) -> np.ndarray:
        if len(arguments[3][0]) == 9 and failures:
            raise failures.pop()
        return read(*arguments)

    monkeypatch.setattr(running, "read_prompts", fail)
    monkeypatch.setattr(reading, "LAUNCHES", 0)  # none is read with another one
    prompts = make_prompts(20, 9, 4)
    sent = [send(engine, prompt) for prompt in prompts]
    with pytest.raises(lr.StepError, match="out of memory"):
        sent[1].result(DEADLINE)
    assert [len(tokens_of(handle)) for handle in (sent[0], sent[2])] == [8, 8]
    assert len(tokens_of(send(engine, prompts[1]))) == 8


def test_an_adapter_whose_values_overflow_harms_itself_alone(
    engine: GenerationEngine, artifact: Path
) -> None:
    engine.load_adapter("huge", artifact.parents[1] / "more-0", scale=1e38)
    prompts = make_prompts(20, 9)
    alone = tokens_of(send(engine, prompts[0], adapter="first"))
    for options in ({"logprobs": 1}, {}, {"temperature": 1.0, "top_k": 3}):
        sent = [
            send(engine, prompts[1], adapter="huge", **options),
            send(engine, prompts[0], adapter="first"),
        ]
        with pytest.raises(lr.NoNumberError, match=r"no number \(NaN\) for this request"):
            sent[0].result(DEADLINE)
        assert tokens_of(sent[1]) == alone
    assert tokens_of(send(engine, prompts[1])) == tokens_of(send(engine, prompts[1], logprobs=0))


def test_a_fault_of_the_thread_ends_the_engine(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(working.Worker, "_admit", fault)
    handle = send(engine, [5, 6])
    with pytest.raises(MemoryError, match="no more"):
        handle.result(DEADLINE)
    engine._thread.join(DEADLINE)
    with pytest.raises(lr.ClosedError, match="the thread that generates has ended: no more"):
        send(engine, [5, 6])
    assert "the thread that generates has ended" in caplog.text


class _Capturing:
    """A session that runs a graph twice to capture it, as onnxruntime does on CUDA."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.captured: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: ort.RunOptions) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        if number != "-1" and number not in self.captured:
            self.captured.add(number)
            self._session.run_with_iobinding(binding, options)
        self._session.run_with_iobinding(binding, options)

    def release_captured_graph(self, number: int) -> None:
        self.captured.remove(str(number))


def test_runs_that_capture_advance_no_row(
    artifact: Path, engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of steps that are first needed while other rows decode."""
    prompts = make_prompts(20, 9, 33, 5)
    wanted = [tokens_of(send(engine, prompt, max_tokens=20)) for prompt in prompts]
    open_session, sessions = running.open_session, []
    make_step, made = running.Runner.make_step, []

    def check(runner: running.Runner, rows: int) -> None:
        """At the end of a row there is no place to advance to."""
        runner.inputs.write()
        assert not runner.inputs.values[GOES_ON].numpy()[:rows].any()
        made.append(rows)
        make_step(runner, rows)

    monkeypatch.setattr(running.Runner, "make_step", check)

    def open_capturing(*arguments: Any) -> Any:
        sessions.append(_Capturing(open_session(*arguments)))
        return sessions[-1]

    monkeypatch.setattr(running, "open_session", open_capturing)
    with open_engine(artifact, rows=4, quota=32, capture=True) as captured:
        first = send(captured, prompts[0], max_tokens=20)
        next(iter(first))
        sent = [first, *(send(captured, prompt, max_tokens=20) for prompt in prompts[1:])]
        assert [tokens_of(handle) for handle in sent] == wanted
        captured.warm_up()
        shapes = captured._worker._runner.prompts.shapes
        assert len(sessions[0].captured) == 3 + len(shapes)
        assert sorted(made) == [1, 2, 4]
    assert sessions[0].captured == set()


# The end


def test_close(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    engine = open_engine(artifact, rows=1)
    running_, queued = send(engine, [5, 6, 7]), send(engine, [5, 6])
    next(iter(running_))
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: engine._gate.is_closed)
    held.let_go()
    closing.join(DEADLINE)
    text = f"the generator of {engine.folder} is closed; open the artifact again"
    for handle in (running_, queued):
        with pytest.raises(lr.ClosedError, match=text):
            handle.result(DEADLINE)
    for call in (lambda: send(engine, [5]), engine.warm_up, engine.list_adapters):
        with pytest.raises(lr.ClosedError, match=text):
            call()  # type: ignore[no-untyped-call]
    engine.close()
    assert not engine._thread.is_alive()
    assert engine.stats().failed >= 1  # the first may have ended before


def test_an_engine_that_is_dropped_ends_its_thread(artifact: Path) -> None:
    engine = open_engine(artifact, rows=1)
    send(engine, [5, 6, 7]).result(DEADLINE)
    thread, kept = engine._thread, [weakref.ref(engine), weakref.ref(engine.host)]
    gc.disable()
    try:
        del engine
        thread.join(DEADLINE)
        del thread
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


# What it is opened with


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"rows": 0}, "rows is 0; expected a whole number from 1 on"),
        ({"length": True}, "length is True; expected a whole number from 1 on"),
        ({"length": 129}, "length is 129; the model takes 128 tokens at most"),
        ({"quota": 1}, "quota is 1; expected a number of tokens from 2 on"),
        ({"most_queued": 0}, "at most 0 queued requests; expected a number from 1 on"),
    ],
)
def test_sizes_that_cannot_be(artifact: Path, sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(lr.InputError, match=text):
        open_engine(artifact, **sizes)


def test_sizes(artifact: Path) -> None:
    with open_engine(artifact) as engine:
        assert (engine.rows, engine.length, engine.vocabulary) == (8, CONTEXT, VOCABULARY)
    with open_engine(artifact, rows=2, length=5) as engine:
        assert (engine.rows, engine.length) == (2, CONTEXT)  # 256, or the whole context
        with pytest.raises(
            lr.InputError, match="of 120 tokens and 9 new ones are more than the 12"
        ):
            send(engine, [5] * 120, max_tokens=9)


@pytest.mark.parametrize("free", [10**12, 60_000, 1])
def test_sizes_follow_free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    from loraexport_runtime.generation.steps import sizes

    class Graph:
        device, cache_dtype, heads, head_size = ("cpu", 0), "float32", 2, 16
        present = dict.fromkeys("abcd", "")

    graph: Any = Graph()
    monkeypatch.setattr(sizes, "_free", lambda device: free)
    rows, length = sizes.choose_sizes(graph, 4096, None, None)
    wanted = {10**12: (8, 4096), 60_000: (1, 256), 1: (1, 256)}
    assert (rows, length) == wanted[free]
    assert sizes.choose_sizes(graph, 4096, 3, 1000) == (3, 1024)
