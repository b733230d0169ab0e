"""A client that goes, at each stage of its request, and one that stays and reads nothing."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.inside import Inside, held, inside
from support.waiting import DEADLINE, wait_until

from loraexport_runtime.generation.loop.worker import STEPS
from loraexport_serve import ModelSettings
from loraexport_serve.ports import _LEAST_READ, _Connection

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
LENGTH, CHUNK = 100, 8
FIRST = itertools.count(10)


@pytest.fixture(scope="module")
def server(encoder: Path, decoder: Path) -> Iterator[Inside]:
    """One answer, and one batch of one text, at a time; prompts are read in small chunks."""
    models = {
        "llama": ModelSettings(path=str(decoder), rows=1),
        "tiny": ModelSettings(path=str(encoder), batch_workers=1),
    }
    with inside(models=models, batch_rows=1) as running:
        running.host("llama").engine._worker._prompts._quota = CHUNK
        yield running


def fresh_prompt() -> list[int]:
    """Tokens of which no row has read the first ones."""
    return [next(FIRST), *range(LENGTH - 1)]


def gone(server: Inside, path: str) -> float:
    return server.metric("loraexport_requests_total", route=path, status="499")


def leases(server: Inside, model: str, adapter: str) -> int:
    num: int = server.host(model).listing()[adapter].leases
    return num


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefill", "decode"])
def test_answers_that_nobody_waits_for(server: Inside, stage: str, stream: bool) -> None:
    """Row and slot are free at once, what was not computed is not, and all of it is counted."""
    host = server.host("llama")
    engine, runner = host.engine, host.engine._worker._runner
    aborted = {"model_name": "llama", "finished_reason": "abort"}
    body = {"model": "first", "prompt": fresh_prompt(), "max_tokens": 20, "stream": stream}
    body["ignore_eos"] = True

    def counts() -> list[float]:
        return [
            gone(server, COMPLETIONS),
            server.metric("loraexport_decoder_cancelled_total", model="llama"),
            server.metric("vllm:request_success_total", **aborted),
        ]

    before, stats = counts(), engine.stats()
    num = 2 if stage == "queued" else 1
    what, skip = ("read", 1) if stage == "prefill" else ("step", 0)
    with held(runner, what, skip) as holding:
        if stage == "queued":  # behind one whose step does not end
            with server.asking(COMPLETIONS, **body):
                holding.wait()
                with server.asking(COMPLETIONS, **body | {"model": "second"}):
                    wait_until(lambda: engine.stats().queued == 1)
                wait_until(lambda: gone(server, COMPLETIONS) == before[0] + 1)
                assert leases(server, "llama", "second") == 0
        else:
            with server.asking(COMPLETIONS, **body):
                holding.wait()
                assert leases(server, "llama", "first") == 1
        wait_until(lambda: gone(server, COMPLETIONS) == before[0] + num)
        assert host.in_flight == {}
    wait_until(lambda: engine.stats().running == engine.stats().queued == 0)
    wait_until(lambda: counts() == [value + num for value in before])
    assert leases(server, "llama", "first") == 0
    after = engine.stats()
    assert after.prompt_tokens - stats.prompt_tokens == LENGTH  # of one of them alone
    assert after.generated_tokens - stats.generated_tokens <= 1 + STEPS
    if stage == "prefill":
        assert after.chunks - stats.chunks == 2
    # The row is another's.
    known = server.client.post(COMPLETIONS, json=body | {"model": "second", "stream": False})
    assert known.json()["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("stage", ["queued", "running"])
def test_texts_that_nobody_waits_for(server: Inside, stage: str) -> None:
    host = server.host("tiny")
    before, stats = gone(server, EMBEDDINGS), host.batcher.stats()
    body = {"model": "sql", "input": ["a", "b", "c"]}
    with held(host.session, "run") as holding:
        with server.asking(EMBEDDINGS, **body):
            holding.wait()
            assert leases(server, "tiny", "sql") == 0  # it is the run's own, which has not begun
            if stage == "queued":
                with server.asking(EMBEDDINGS, **body | {"model": "chat"}):
                    wait_until(lambda: host.batcher.stats().queued == 5)
                wait_until(lambda: gone(server, EMBEDDINGS) == before + 1)
        wait_until(lambda: gone(server, EMBEDDINGS) == before + (2 if stage == "queued" else 1))
        assert (host.in_flight, host.num_rows) == ({}, 0)
    wait_until(lambda: host.batcher.stats().queued == 0)
    after = host.batcher.stats()
    assert after.cancelled - stats.cancelled == (5 if stage == "queued" else 2)
    wait_until(lambda: host.batcher.stats().requests == stats.requests + 1)  # what had begun
    assert server.client.post(EMBEDDINGS, json=body).is_success


def test_time_in_the_queue(server: Inside) -> None:
    """Of an encoder's request as of a decoder's: until the first of its texts was run."""

    def counts(model: str) -> list[float]:
        return [
            server.metric("loraexport_queue_seconds_count", model=model),
            server.metric("vllm:request_queue_time_seconds_count", model_name=model),
        ]

    before = counts("tiny"), counts("llama")
    waited = server.metric("loraexport_queue_seconds_sum", model="tiny")
    host = server.host("tiny")
    asking = server.asking(EMBEDDINGS, model="sql", input="a")
    with held(host.session, "run") as holding, asking as first:
        holding.wait()
        with server.asking(EMBEDDINGS, model="sql", input=["a", "b"]) as second:
            wait_until(lambda: host.batcher.stats().queued == 2)
            holding.release()
            assert b" 200 " in first.recv(100)
            assert b" 200 " in second.recv(100)
    body = {"model": "first", "prompt": fresh_prompt(), "max_tokens": 2}
    assert server.client.post(COMPLETIONS, json=body).is_success
    after = counts("tiny"), counts("llama")
    assert [new - old for new, old in zip(after[0], before[0], strict=True)] == [2, 2]
    assert [new - old for new, old in zip(after[1], before[1], strict=True)] == [1, 1]
    assert server.metric("loraexport_queue_seconds_sum", model="tiny") > waited


def test_a_client_that_reads_nothing(encoder: Path, decoder: Path) -> None:
    """It is cut, so that the artifact that it uses can be exchanged; a whole answer's too."""
    models = {"llama": str(decoder), "tiny": str(encoder)}
    stalled = "loraexport_stalled_connections_total"
    body: dict[str, Any] = {"model": "first", "prompt": "hello", "max_tokens": 100, "n": 8}
    body |= {"stream": True, "logprobs": 20, "ignore_eos": True, "temperature": 1.0}
    with inside(send_buffer=4096, write_timeout=0.5, models=models) as server:
        former = server.host("llama")
        with server.asking(COMPLETIONS, 4096, **body) as plain:
            assert b" 200 " in plain.recv(100)
            new = ModelSettings(path=str(decoder))
            assert server.run(server.service.start("llama", new), 4 * DEADLINE) is not former
            wait_until(lambda: gone(server, COMPLETIONS) == 1)
            assert server.metric(stalled) == 1
        with server.asking(EMBEDDINGS, 4096, model="sql", input=["a"] * 1000) as plain:
            assert b" 200 " in plain.recv(100)
            wait_until(lambda: server.metric(stalled) == 2)
        assert server.client.post(EMBEDDINGS, json={"model": "sql", "input": "a"}).is_success


class Transport:
    """What a connection writes to: so much is left at each look."""

    def __init__(self, *left: int) -> None:
        self.left, self.is_cut = list(left), False

    def get_write_buffer_size(self) -> int:
        return self.left.pop(0)

    def abort(self) -> None:
        self.is_cut = True


@pytest.mark.parametrize(
    ("left", "is_cut"),
    [
        ([70_000, 70_000], True),
        ([70_000, 70_000 - _LEAST_READ + 1], True),
        ([70_000, 70_000 - _LEAST_READ] * 1, False),
        ([90_000, 60_000, 60_000, 40_000, 40_000, 39_000], True),
        ([10, 0], False),
    ],
)
def test_who_reads_slowly_is_not_cut(left: list[int], is_cut: bool) -> None:
    """Only who reads next to nothing between two looks."""
    looks: list[Any] = []

    class Loop:
        def call_later(self, seconds: float, *call: Any) -> Any:
            assert seconds == 5.0
            looks.append(call)

    num_stalled: list[bool] = []
    connection = object.__new__(_Connection)
    transport = Transport(*left, left[-1])
    connection.transport, connection.loop = transport, Loop()  # type: ignore[assignment]
    connection._timeout, connection._looking = 5.0, None
    connection._on_stalled = lambda: num_stalled.append(True)
    connection._watch()
    while looks and len(transport.left) > 1:
        look, before = looks.pop()
        look(before)
    assert (transport.is_cut, bool(num_stalled)) == (is_cut, is_cut)
