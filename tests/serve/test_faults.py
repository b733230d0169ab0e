"""Whatever a client sends or does, the answer is no 500, and the next one is served."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.serving import DEADLINE, Server, error
from support.waiting import wait_until

PATHS = (
    "/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify", "/pooling", "/tokenize",
    "/detokenize",
)  # fmt: skip
KEYS = (
    "input", "model", "query", "documents", "prompt", "messages", "tokens", "text_1", "text_2",
    "dimensions", "encoding_format", "truncate_prompt_tokens", "adapters", "top_n", "user",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _still_serves(server: Server) -> Iterator[None]:
    yield
    assert server.post("/v1/embeddings", model="sql", input="hello").status_code == 200


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as plain:
        yield plain


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/embeddings HTTP/1.1", "host: a", f"content-length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"nothing", b"\xff\xfe", b"null", b"[]", b'"a"', b"{}", b"NaN",
        b'{"input": NaN}',
        b'{"input": 1e999}', b'{"input": "\\ud800"}', b'{"input": "\xff"}', b"[" * 100_000,
        b'{"input": ' + b"[" * 100_000, b'{"input": "a", "input": 3}', b'{"input": "a"} x',
        b'{"input": [[9999999999999999999999]]}', b'{"input": "a", "adapters": {"sql": 1e400}}',
    ],
    ids=lambda content: repr(content[:24]),
)  # fmt: skip
def test_what_is_no_body(server: Server, content: bytes) -> None:
    for path in PATHS:
        assert error(server.client.post(path, content=content))[0] == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5))
def test_wrong_types_everywhere(server: Server, path: str, body: dict[str, object]) -> None:
    answer = server.client.post(path, content=json.dumps(body))
    assert answer.status_code in (200, 400, 404, 413)
    assert answer.json()


def test_a_body_beyond_the_limit(server: Server) -> None:
    """It is refused by its length before it comes, and by its size where it has none."""
    large = 5 * 2**20
    with connected(server) as plain:
        plain.sendall(head(large))
        assert plain.recv(4096).startswith(b"HTTP/1.1 413")
    text = b"a" * large
    refused = server.client.post("/v1/embeddings", content=iter([b'{"input": "', text, b'"}']))
    assert error(refused) == (413, "body_too_large")


@pytest.mark.parametrize(
    "content",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
        b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_what_is_hardly_http(server: Server, content: bytes) -> None:
    with connected(server) as plain:
        plain.settimeout(1)
        try:
            plain.sendall(content)
            answer = plain.recv(4096)
        except (TimeoutError, ConnectionError):
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")


@pytest.mark.parametrize("sent", [0, 1, 60])
def test_a_client_that_goes_while_its_body_comes(server: Server, sent: int) -> None:
    before = _gone(server)
    body = b'{"model": "sql", "input": "hello"}'
    with connected(server) as plain:
        plain.sendall(
            (head(len(body) + 100) + body)[: -len(body) + sent] if sent < 60 else head(99)
        )
    wait_until(lambda: _gone(server) == before + 1)


def test_a_client_that_goes_while_it_waits(server: Server) -> None:
    """Its rows leave the queue, and it is counted as gone."""
    before, cancelled = _gone(server), _cancelled(server)
    body = json.dumps({"model": "sql", "input": ["hello " * 60] * 2000}).encode()
    with connected(server) as plain:
        plain.sendall(head(len(body)) + body)
        wait_until(lambda: _number(server, 'vllm:num_requests_waiting{model_name="tiny"}') > 0)
    wait_until(lambda: _gone(server) == before + 1)
    wait_until(lambda: _number(server, 'vllm:num_requests_waiting{model_name="tiny"}') == 0)
    assert _cancelled(server) > cancelled


def test_slow_and_half_open_sockets_hold_up_nobody(server: Server) -> None:
    sockets = []
    try:
        for _ in range(50):
            host, _, port = server.url.removeprefix("http://").partition(":")
            plain = socket.create_connection((host, int(port)))
            plain.sendall(head(100)[:-1])
            sockets.append(plain)
        start = time.monotonic()
        assert server.post("/v1/embeddings", input="hello").is_success
        assert time.monotonic() - start < DEADLINE
    finally:
        for plain in sockets:
            plain.close()


def test_many_at_once_are_each_served_their_own(server: Server) -> None:
    """What a request gives among others is what it gives alone, to rounding."""
    texts = ["hello", "hello world", "the adapter 's batch", "don't , stop ."]
    models = ["tiny", "sql", "chat"]
    jobs = [(model, text) for model in models for text in texts]

    def ask(model: str, text: str) -> list[float]:
        with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
            body = {"model": model, "input": text}
            vector: list[float] = client.post("/v1/embeddings", json=body).json()["data"][0][
                "embedding"
            ]
        return vector

    alone = {job: ask(*job) for job in jobs}
    wrong: list[object] = []

    def work(shift: int) -> None:
        for model, text in jobs[shift:] + jobs[:shift]:
            got = ask(model, text)
            if max(abs(a - b) for a, b in zip(got, alone[model, text], strict=True)) > 2e-6:
                wrong.append((model, text))

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_and_paths(server: Server, method: str) -> None:
    assert error(server.client.request(method, "/v1/embeddings"))[0] == 405
    assert error(server.client.request(method, "/v1/nothing"))[0] == 404


def _number(server: Server, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _gone(server: Server) -> float:
    return _number(server, 'loraexport_requests_total{route="/v1/embeddings",status="499"}')


def _cancelled(server: Server) -> float:
    return _number(server, 'loraexport_encoder_cancelled_total{model="tiny"}')
