"""More than there is room or time for: refused with what to do, and nobody else is held up."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.serving import ADMIN, DEADLINE, Server, bearer, error, serving
from support.waiting import wait_until


@pytest.fixture(scope="module")
def server(encoder: Path) -> Iterator[Server]:
    """Its batches begin later than any request waits."""
    flags = ["--max-queued", "64", "--queue-timeout", "0.01", "--batch-delay", "0.1"]
    with serving(f"tiny={encoder}", *flags, "--body-timeout", "0.2") as running:
        yield running


def test_a_full_queue_is_429(server: Server) -> None:
    """All of a request waits, or none: what was queued of it goes with the refusal."""
    refused = server.post("/v1/embeddings", input=["hello"] * 65)
    assert error(refused) == (429, "queue_full")
    assert refused.headers["retry-after"] == "1"
    assert "try again later" in refused.json()["error"]["message"]
    assert server.post("/tokenize", prompt="hello").is_success


def test_who_waits_too_long_is_408(server: Server) -> None:
    late = server.post("/v1/embeddings", input=["hello"] * 4)
    assert error(late) == (408, "timeout")
    assert server.post("/tokenize", prompt="hello").is_success


def test_a_body_that_never_comes(server: Server) -> None:
    def slowly() -> Iterator[bytes]:
        yield b'{"input": "'
        threading.Event().wait(0.5)
        yield b'a"}'

    refused = server.client.post("/v1/embeddings", content=slowly())
    assert error(refused) == (408, "timeout")
    assert refused.headers["connection"] == "close"


def test_a_restricted_keys_requests_take_turns_together(encoder: Path, tmp_path: Path) -> None:
    """A tenant who floods delays himself: another one's request does not wait for the flood."""
    (tmp_path / "keys.yaml").write_text(
        json.dumps(
            {
                "keys": [
                    {"name": "loud", "key": "a-loud-ones-own-key", "adapters": ["sql", "chat"]},
                    {"name": "calm", "key": "a-calm-ones-own-key", "adapters": ["sql"]},
                ]
            }
        )
    )
    flags = ["--keys-file", str(tmp_path / "keys.yaml"), "--batch-rows", "1"]
    with serving(f"tiny={encoder}", *flags, LORAEXPORT_ADMIN_TOKEN=ADMIN) as server:
        done: list[str] = []

        def ask(key: str, count: int) -> None:
            body = {"model": "sql", "input": ["hello " * 60] * count}
            with httpx.Client(base_url=server.url, timeout=DEADLINE, headers=bearer(key)) as client:
                assert client.post("/v1/embeddings", json=body).is_success
            done.append(key)

        loud = threading.Thread(target=ask, args=("a-loud-ones-own-key", 600))
        loud.start()
        line = 'vllm:num_requests_waiting{model_name="tiny"} '
        wait_until(lambda: waiting(server.get("/metrics", key=ADMIN).text, line) > 100)
        ask("a-calm-ones-own-key", 1)
        loud.join()
    assert done == ["a-calm-ones-own-key", "a-loud-ones-own-key"]


def waiting(metrics: str, name: str) -> float:
    return sum(float(line[len(name) :]) for line in metrics.splitlines() if line.startswith(name))
