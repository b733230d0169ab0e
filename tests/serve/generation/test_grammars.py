"""Grammars that take long, or become too complex: nobody else waits, and we stay ready."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.inside import Inside, held, inside
from support.serving import error
from support.waiting import DEADLINE, wait_until

from loraexport_runtime import GenerationHandle
from loraexport_serve.service import _COMPILERS

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": "first", "prompt": "hello", "max_tokens": 8}
WIDE = {"type": "object", "properties": {f"p{index}": {} for index in range(1000)}}
"""More may follow `{` than llguidance takes."""


@pytest.fixture(scope="module")
def server(decoder: Path) -> Iterator[Inside]:
    with inside(models={"llama": str(decoder)}) as running:
        yield running


def ask(server: Inside, path: str = PATH, **body: Any) -> Any:
    return server.client.post(path, json=BODY | body)


def test_a_grammar_holds_up_nobody(server: Inside) -> None:
    """Neither steps nor texts wait for those that are compiled, however many."""
    engine = server.host("llama").engine
    num = _COMPILERS + 2
    with ThreadPoolExecutor(num) as pool, held(engine, "_open_grammar") as holding:
        sent = [pool.submit(ask, server, guided_regex="(yes|no)[.]") for _ in range(num)]
        holding.wait()
        before = engine.stats().steps
        messages = [{"role": "user", "content": "hello"}]
        assert ask(server, ignore_eos=True, max_tokens=40).is_success
        assert engine.stats().steps - before >= 39
        body = {"model": "first", "messages": messages, "max_tokens": 2}
        chat = server.client.post("/v1/chat/completions", json=body)  # its template is beside too
        assert chat.is_success
        assert not any(one.done() for one in sent)
        holding.release()
        texts = {one.result(DEADLINE).json()["choices"][0]["text"] for one in sent}
    assert texts <= {"yes.", "no."}


def test_one_that_is_not_compiled_in_time(decoder: Path) -> None:
    """Its request is over; what it became is given up once it is there."""
    with inside(models={"llama": str(decoder)}, queue_timeout=0.2) as server:
        engine = server.host("llama").engine
        with held(engine, "_open_grammar") as holding:
            assert error(ask(server, guided_regex="a{8}")) == (408, "timeout")
            holding.wait()
        wait_until(lambda: engine.stats().cancelled == 1)
        assert engine.stats().running == engine.stats().queued == 0


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_one_that_becomes_too_complex(
    server: Inside, stream: bool, is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the client's fault each time, so that the server stays ready for others.

    Args:
        is_late: what has come is looked at once the error is there, beside tokens ahead of it.
    """
    if is_late:
        listen = GenerationHandle.listen

        def listen_late(handle: GenerationHandle, listener: Callable[[], None]) -> None:
            wait_until(lambda: handle.is_done)
            listen(handle, listener)

        monkeypatch.setattr(GenerationHandle, "listen", listen_late)
    for _ in range(6):
        answer = ask(server, guided_json=WIDE, stream=stream)
        if answer.status_code == 200:  # the first token had come
            assert "guided_json: it is too complex at this place" in answer.text
            assert not answer.text.endswith("data: [DONE]\n\n")
        else:
            assert error(answer)[0] == 400
            assert answer.json()["error"]["param"] == "guided_json"
    assert server.client.get("/readyz").is_success


def test_one_of_which_no_token_is_left(server: Inside) -> None:
    """Another field forbids what it asks for."""
    body = {"guided_regex": "", "min_tokens": 4, "stop_token_ids": list(range(320))}
    for _ in range(6):
        answer = ask(server, **body | {"guided_regex": "a"})
        assert error(answer)[0] == 400
        assert "no token is left that may come next" in answer.text
    assert server.client.get("/readyz").is_success
