"""A server from its first signal to its last: probes at each phase, drain, and what ends it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from support.serving import DEADLINE, Server, error, serving, started
from support.waiting import wait_until

PROBES = ("livez", "startupz", "readyz", "health", "ping")


def probe(server: Server) -> dict[str, int]:
    return {name: server.client.get(f"/{name}").status_code for name in PROBES}


def refused_start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A server that ends by itself."""
    command = [sys.executable, "-m", "loraexport_serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_the_port_is_open_before_the_artifact_is_loaded(encoder: Path, tmp_path: Path) -> None:
    """Probes tell the phases apart, and a model is 503 until it is there."""
    with started(f"tiny={encoder}") as server:
        first = probe(server)
        assert first["livez"] == 200
        assert set(first.values()) <= {200, 503}
        if first["readyz"] == 503:  # a machine may be quick
            assert first["startupz"] == first["health"] == 503
            early = server.get("/v1/models")
            assert early.status_code in (200, 503)
            if early.status_code == 503:
                assert error(early) == (503, "starting")
                assert early.headers["retry-after"] == "1"
        server.wait_ready()
        assert set(probe(server).values()) == {200}
        assert server.get("/version").json()["version"]
        assert server.end() == 0


def test_an_artifact_that_cannot_be_opened_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, code in (("empty", 5), ("nowhere", 5)):
        command = [sys.executable, "-m", "loraexport_serve", str(tmp_path / name), "--port", "0"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE, check=False
        )
        assert done.returncode == code, done.stderr
        assert "loraexport-serve: " in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_layers_have_no_route(small: Path) -> None:
    done = refused_start(f"a={small}", "--port", "0")
    assert done.returncode == 5
    assert "holds single layers" in done.stderr


def test_a_port_that_is_taken(encoder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "loraexport_serve", f"tiny={encoder}", "--port", port]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE, check=False
        )
    assert done.returncode == 2
    assert "in use" in done.stderr


class Load:
    """Clients that ask until they are told to stop, each over connections of its own."""

    def __init__(self, server: Server, clients: int) -> None:
        self.server, self.is_over = server, threading.Event()
        self.outcomes = Counter[str]()
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        body = {"model": "sql", "input": ["hello world"] * 16}
        while not self.is_over.is_set():
            try:
                with httpx.Client(base_url=self.server.url, timeout=DEADLINE) as client:
                    answer = client.post("/v1/embeddings", json=body)
                whole = answer.status_code == 200 and len(answer.json()["data"]) == 16
                self.outcomes["whole" if whole else str(answer.status_code)] += 1
            except httpx.ConnectError:
                self.outcomes["refused"] += 1
                return
            except httpx.HTTPError as lost:
                self.outcomes[type(lost).__name__] += 1

    def end(self) -> Counter[str]:
        self.is_over.set()
        for thread in self.threads:
            thread.join(DEADLINE)
        return self.outcomes


def test_sigterm_under_load_answers_all_that_was_accepted(encoder: Path) -> None:
    """An answer is whole, or says 503; a connection that was not accepted yet may be reset."""
    with started(f"tiny={encoder}") as server:
        server.wait_ready()
        load = Load(server, 8)
        wait_until(lambda: load.outcomes["whole"] > 30)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE) == 0
        outcomes = load.end()
    assert outcomes["whole"] > 30
    assert set(outcomes) <= {"whole", "503", "refused", "ReadError"}, outcomes
    assert "failed" not in server.log
    # What was in flight got an answer: none of the accepted ones ended without one.
    assert "Cancel" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_forces_the_end(encoder: Path, number: signal.Signals) -> None:
    """A body that never ends to come keeps the first from ending."""
    with started(f"tiny={encoder}", "--body-timeout", "600") as server:
        server.wait_ready()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{")
            wait_until(lambda: "loraexport_requests_in_flight 2.0" in server.get("/metrics").text)
            server.process.send_signal(number)
            time.sleep(0.3)
            assert server.process.poll() is None
            server.process.send_signal(number)
            assert server.process.wait(DEADLINE) == 0


def test_a_killed_server_leaves_nothing_that_keeps_the_next_from_starting(
    encoder: Path, tmp_path: Path
) -> None:
    """The socket of operators is taken over, and adapters of the watched folder are back."""
    settings = tmp_path / "settings.yaml"
    (tmp_path / "watched").mkdir()
    os.symlink(encoder.parents[1] / "legal", tmp_path / "watched/legal")
    settings.write_text(
        f"models: {{tiny: {{path: {encoder}, adapter_folder: {tmp_path}/watched}}}}\n"
        f"admin_socket: {tmp_path}/s\nadapter_roots: [{encoder.parents[1]}]\n"
    )
    arguments = ("--config", str(settings))
    token = {"LORAEXPORT_ADMIN_TOKEN": "x" * 16}
    with started(*arguments, **token) as server:
        server.wait_ready()
        assert server.post("/v1/embeddings", model="legal", input="a").is_success
        server.process.kill()
        server.process.wait(DEADLINE)
    assert (tmp_path / "s").exists()
    with serving(*arguments, **token) as server:
        assert server.post("/v1/embeddings", model="legal", input="a").is_success
    assert not (tmp_path / "s").exists()
