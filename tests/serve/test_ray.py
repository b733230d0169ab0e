"""Two replicas on Ray: any of them answers, and what a client sees when one is killed."""

import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.decoders import write_tenants
from support.documents import ROOT
from support.home import Home
from support.serving import Server
from support.triton import free_port
from support.waiting import wait_until

PYTHON = ROOT / ".venv-ray/bin/python"
"""Of an environment of Ray's own, as its packages are many."""
DRIVER = ROOT / "tests/serve/ray_driver.py"
PATIENCE = 300.0
"""Seconds for each step: Ray starts ten processes of Python, on a machine with other work."""
RAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    # Beside other tests its 15 would leave a replica a thirtieth of a core.
    "RAY_worker_niceness": "0",
    # It would kill a replica where all processes of the machine, not its own, fill the memory.
    "RAY_memory_monitor_refresh_ms": "0",
    # What Ray gives up on, or kills and begins again, where a process takes its time; see the
    # driver for what no variable sets.
    "RAY_raylet_start_wait_time_s": f"{PATIENCE:.0f}",
    "RAY_gcs_server_port_wait_time_s": f"{PATIENCE:.0f}",
    "RAY_gcs_rpc_server_connect_timeout_s": f"{PATIENCE:.0f}",
    "RAY_gcs_server_request_timeout_seconds": f"{PATIENCE:.0f}",
    "RAY_worker_register_timeout_seconds": f"{PATIENCE:.0f}",
    "RAY_agent_register_timeout_ms": f"{1000 * PATIENCE:.0f}",
    "RAY_health_check_timeout_ms": f"{1000 * PATIENCE:.0f}",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{PATIENCE:.0f}",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": f"{PATIENCE:.0f}",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.is_file(), reason="scripts/setup --end-to-end ray"),
]
LONG: dict[str, Any] = {"n": 60, "temperature": 1.0, "guided_regex": "[a-z ]*"}
"""Answers of a stream that lasts for as long as a test needs."""
JOBS = [(text, name) for text in ("hello", "a batch", "the model") for name in ("", "sql", "chat")]


class Cluster:
    """Ray with the application, as a process; `client` asks its proxy."""

    def __init__(self, process: "subprocess.Popen[str]", client: httpx.Client) -> None:
        self.process, self.client = process, client
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, word: str) -> None:
        """The driver's next line, which is this."""
        assert self._lines.get(timeout=PATIENCE).strip() == word, "the driver has ended"

    def kill(self, which: str) -> None:
        """`none` of the replicas, `one`, or `all`, as they are, once all run."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"kill {which}\n")
        self.process.stdin.flush()
        self.wait_for(f"kill {which}")

    def close(self) -> None:
        """Once the process has ended."""
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def embed(self, text: str, adapter: str) -> httpx.Response:
        model = f"tiny:{adapter}" if adapter else "tiny"
        return self.client.post("/v1/embeddings", json={"model": model, "input": text})

    def complete(
        self, seed: int, on_begin: Callable[[], object] = lambda: None, **more: Any
    ) -> str:
        """A stream: `done`, `error`, or `cut`, which none may be."""
        body = {"model": "llama:first", "prompt": [5, 6, seed], "max_tokens": 100}
        body |= {"ignore_eos": True, "stream": True, **more}
        end = "cut"
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            on_begin()
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    end = "done"
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    assert end == "cut", "an error ends the stream"
                    end = "error" if "error" in event else end
                    if end == "error":
                        assert event["error"]["code"] == "replica_died"
        return end


@pytest.fixture(scope="module")
def cluster(encoder: Path, home: Home) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets want a short path
    decoder = {"path": str(home.artifact(write_tenants)), "rows": 1}
    settings = {"models": {"tiny": str(encoder), "llama": decoder}, "queue_timeout": PATIENCE}
    (folder / "settings.json").write_text(json.dumps(settings))
    port = free_port()
    arguments = [str(PYTHON), str(DRIVER), "serve", str(port), str(folder / "settings.json")]
    pipe = subprocess.PIPE
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*arguments, str(folder)],
            stdin=pipe,
            stdout=pipe,
            stderr=log,
            text=True,
            env=os.environ | RAYS,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            running = Cluster(process, client)
            try:
                running.wait_for("ready")
                yield running
                assert process.stdin is not None
                process.stdin.close()
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()
                process.wait()
                running.close()
    except BaseException:
        print((folder / "log").read_text()[-5000:])
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_no_request_is_lost_with_a_replica(cluster: Cluster, server: Server) -> None:
    """Each is answered as the server alone answers it, while replicas are killed twice."""
    wanted = {}
    for text, name in JOBS:
        model = f"tiny:{name}" if name else "tiny"
        answer = server.post("/v1/embeddings", model=model, input=text)
        wanted[text, name] = answer.json()["data"][0]["embedding"]
    with ThreadPoolExecutor(8) as threads:
        answers = [(job, threads.submit(cluster.embed, *job)) for job in JOBS * 10]
        cluster.kill("one")
        answers += [(job, threads.submit(cluster.embed, *job)) for job in JOBS * 10]
        answers[-30][1].result()
        cluster.kill("one")
    for job, future in answers:
        answer = future.result()
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["data"][0]["embedding"], wanted[job], atol=1e-5)
    refused = cluster.embed("hello", "nobody")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert cluster.client.get("/metrics").status_code == 404
    assert cluster.client.get("/").status_code == 404
    assert cluster.client.get("/readyz").json() == {"status": "ready"}


def test_streams_while_a_replica_is_killed(cluster: Cluster) -> None:
    """One that has not begun is asked again; none is cut without a word."""
    with ThreadPoolExecutor(12) as threads:
        streams = [threads.submit(cluster.complete, seed) for seed in range(10, 34)]
        cluster.kill("one")
        ends = {stream.result() for stream in streams}
    assert ends <= {"done", "error"}


def test_a_stream_that_has_begun_ends_with_an_error(cluster: Cluster) -> None:
    """And who asks when all replicas are gone is answered again before long."""
    cluster.kill("none")
    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(cluster.complete, 10, begun.set, **LONG)
        assert begun.wait(PATIENCE)
        cluster.kill("all")
        assert stream.result() == "error"
    wait_until(lambda: cluster.embed("hello", "sql").status_code == 200, PATIENCE)


def test_the_applications_file() -> None:
    """Its keys are Ray's, and its arguments ours; what would not work is refused."""
    file = ROOT / "examples/serve/deploy/ray.yaml"
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "taken"),
        ({"port": 1}, "where to listen is Ray's"),
        ({"allow_adapter_updates": True}, "would reach one replica alone"),
        ({"batch_row": 1}, "batch-row"),
    ]
    lines = "".join(f"{json.dumps(settings)}\n" for settings, _ in cases)
    command = [str(PYTHON), str(DRIVER), "check", str(file)]
    told = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=PATIENCE, check=True
    ).stdout.splitlines()
    assert told[0] == "loraexport_serve.ray:app"
    for said, (_, text) in zip(told[1:], cases, strict=True):
        assert text in said
