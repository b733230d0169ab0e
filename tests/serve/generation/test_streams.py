"""Who is refused, whose time is over, who goes: the row is free again for others."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from support.serving import Server, error, started
from support.waiting import wait_until

from loraexport_runtime import QueueFullError, StepError
from loraexport_serve import ModelSettings, Settings
from loraexport_serve.auth import Keys
from loraexport_serve.routes.common import Body
from loraexport_serve.routes.endpoint import Call, post
from loraexport_serve.routes.generation import events
from loraexport_serve.routes.generation.events import Events
from loraexport_serve.service import Phase, Service

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 120, "guided_regex": ".*", "seed": 0}
LONG["temperature"] = 1.0
"""With n=60 it keeps the one row for as long as a test needs."""


def metric(server: Server, name: str) -> float:
    found = re.search(rf"^{name}{{[^}}]*}} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def unfinished(server: Server) -> float:
    """Answers in the row and in the queue."""
    running = metric(server, "vllm:num_requests_running")
    return running + metric(server, "vllm:num_requests_waiting")


def wait_idle(server: Server) -> None:
    wait_until(lambda: unfinished(server) == 0)


def begin(stack: ExitStack, server: Server, **body: Any) -> Iterator[bytes]:
    """What is left of a stream whose first bytes have come; it is closed with the stack."""
    request = server.client.stream("POST", PATH, json={**LONG, "stream": True, **body})
    response = stack.enter_context(request)
    assert response.status_code == 200
    rest = response.iter_raw()
    next(rest)
    stack.callback(rest.close)  # type: ignore[attr-defined]
    return rest


def leave(server: Server, **body: Any) -> None:
    """Ask, and go before anything is answered."""
    with (
        httpx.Client(base_url=server.url, trust_env=False, timeout=0.1) as client,
        pytest.raises(httpx.ReadTimeout),
    ):
        client.post(PATH, json=LONG | body)


def test_a_client_that_goes_while_it_is_answered(narrow: Server) -> None:
    before = metric(narrow, "loraexport_decoder_cancelled_total")
    with ExitStack() as stack:
        begin(stack, narrow, n=60)
        assert unfinished(narrow) > 0
    wait_idle(narrow)
    assert metric(narrow, "loraexport_decoder_cancelled_total") > before
    assert 'finished_reason="abort"' in narrow.get("/metrics").text
    assert narrow.post(PATH, prompt="hello", max_tokens=2).is_success
    assert narrow.get("/readyz").is_success


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_it_waits(narrow: Server, stream: bool) -> None:
    with ExitStack() as stack:
        begin(stack, narrow, n=50)
        leave(narrow, n=4, stream=stream)
        wait_until(lambda: unfinished(narrow) <= 50)
        assert unfinished(narrow) > 0
    wait_idle(narrow)


def test_a_client_that_goes_before_the_whole_answer(narrow: Server) -> None:
    leave(narrow, n=60)
    wait_idle(narrow)
    wait_until(lambda: " 499 " in narrow.log)


def test_a_full_queue(narrow: Server) -> None:
    with ExitStack() as stack:
        begin(stack, narrow, n=60)
        refused = narrow.post(PATH, **LONG, n=60)
        assert error(refused) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        assert error(narrow.post(PATH, **LONG, n=60, stream=True)) == (429, "queue_full")
    wait_idle(narrow)


def test_a_deadline_in_the_queue(narrow: Server) -> None:
    """It has a status also where a stream was asked for."""
    with ExitStack() as stack:
        begin(stack, narrow, n=50)
        assert error(narrow.post(PATH, **LONG)) == (408, "timeout")
        assert error(narrow.post(PATH, **LONG, stream=True)) == (408, "timeout")
    wait_idle(narrow)


def test_sigterm_lets_a_stream_end(decoder: Path) -> None:
    with started(f"llama={decoder}") as server, ExitStack() as stack:
        server.wait_ready()
        rest = begin(stack, server, n=8)
        server.process.terminate()
        text = b"".join(rest).decode()
        assert text.count('"finish_reason":"') == 8
        assert text.endswith("data: [DONE]\n\n")
        assert server.process.wait(60) == 0, server.log


def of_chunks(failure: Exception) -> str:
    """What a client reads of a stream that fails after its first chunk."""

    async def chunks() -> AsyncGenerator[list[Any], None]:
        yield [{"a": 1}, {"b": 2}]
        raise failure

    async def answer(call: Call[Body]) -> Response:
        return Events(call, chunks())

    async def ask() -> str:
        service = Service(Settings(models={"a": ModelSettings(path="a")}), Keys())
        service.phase = Phase.READY
        app = Starlette(routes=[post(service, "/", Body, None, answer)])
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            response = await client.post("/", json={})
        await service.close()
        assert response.status_code == 200
        return response.text

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("failure", "code"), [(StepError("at /a/path"), "failed"), (QueueFullError("no"), "queue_full")]
)
def test_an_error_is_the_last_event(failure: Exception, code: str) -> None:
    first, second, last, rest = of_chunks(failure).split("\n\n")
    assert (first, second, rest) == ('data: {"a":1}', 'data: {"b":2}', "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert "/a/path" not in last


def test_an_event_is_one_line() -> None:
    """Also to a client that splits lines at every mark that Unicode has for it."""
    value = {"text": "a\u2028b\u2029c\x85d\ne\x0bf\x1cg\u20ac"}
    event = events._event(value).decode()
    assert event.endswith("\n\n")
    (line,) = event.removesuffix("\n\n").splitlines()
    assert json.loads(line.removeprefix("data: ")) == value
