"""Two replicas on Ray: any of them answers, and what a client sees when one is killed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from support.decoders import write_tenants
from support.documents import ROOT
from support.home import Home
from support.serving import Server
from support.triton import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="pip install './runtime/serve[ray]'"
    ),
]
DRIVER = ROOT / "tests/serve/ray_driver.py"
JOBS = [(text, name) for text in ("hello", "a batch", "the model") for name in ("", "sql", "chat")]


class Cluster:
    """Ray with the application, as a process; `client` asks its proxy."""

    def __init__(self, process: "subprocess.Popen[str]", client: httpx.Client) -> None:
        self.process, self.client = process, client

    def read(self, word: str) -> None:
        """Up to the line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return
        raise AssertionError(f"the driver has ended before {word!r}")

    def kill(self) -> None:
        """One replica, as it is."""
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        self.read("killed")

    def embed(self, text: str, adapter: str) -> httpx.Response:
        model = f"tiny:{adapter}" if adapter else "tiny"
        return self.client.post("/v1/embeddings", json={"model": model, "input": text})

    def complete(self, seed: int, on_event: Callable[[], None]) -> str:
        """A stream: `done`, `error`, or `cut`, which none may be."""
        body = {"model": "llama:first", "prompt": [5, 6, seed], "max_tokens": 100}
        body |= {"ignore_eos": True, "stream": True}
        end = "cut"
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
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
                    on_event()
        return end


@pytest.fixture(scope="module")
def cluster(encoder: Path, home: Home) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets want a short path
    decoder = {"path": str(home.artifact(write_tenants)), "rows": 1}
    settings = {"models": {"tiny": str(encoder), "llama": decoder}}
    (folder / "settings.json").write_text(json.dumps(settings))
    port = free_port()
    arguments = [sys.executable, str(DRIVER), str(port), str(folder / "settings.json"), str(folder)]
    log = (folder / "log").open("w")
    variables = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    variables["RAY_raylet_start_wait_time_s"] = "200"  # of a busy machine
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        arguments, stdin=pipe, stdout=pipe, stderr=log, text=True, env=variables
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            running = Cluster(process, client)
            running.read("ready")
            yield running
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    except BaseException:
        print((folder / "log").read_text()[-5000:])
        raise
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, log):
            if stream is not None:
                stream.close()
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
        cluster.kill()
        answers += [(job, threads.submit(cluster.embed, *job)) for job in JOBS * 10]
        answers[-30][1].result()
        cluster.kill()
    for job, future in answers:
        answer = future.result()
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["data"][0]["embedding"], wanted[job], atol=1e-5)
    refused = cluster.embed("hello", "nobody")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert cluster.client.get("/metrics").status_code == 404
    assert cluster.client.get("/").status_code == 404
    assert cluster.client.get("/readyz").json() == {"status": "ready"}


def test_a_stream_that_has_begun_ends_with_an_error(cluster: Cluster) -> None:
    """Those that have not begun are asked again; none is cut without a word."""
    ends: list[str] = []
    for _ in range(5):
        killed: list[bool] = []

        def kill_once(killed: list[bool] = killed) -> None:
            if not killed:
                killed.append(True)
                cluster.kill()

        with ThreadPoolExecutor(12) as threads:
            ends += threads.map(cluster.complete, range(10, 22), [kill_once] * 12)
        if "error" in ends:
            break
    assert set(ends) == {"done", "error"}, ends


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's schema
def test_the_applications_file() -> None:
    """Its keys are Ray's, and its arguments ours; what would not work is refused."""
    from ray.serve.schema import ServeDeploySchema

    from loraexport_serve import SettingsError
    from loraexport_serve.ray import app

    read = yaml.safe_load((ROOT / "examples/serve/deploy/ray.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(read).applications
    assert application.import_path == "loraexport_serve.ray:app"
    app(application.args)
    models: dict[str, Any] = application.args["settings"]["models"]
    for more, text in (
        ({"port": 1}, "where to listen is Ray's"),
        ({"allow_adapter_updates": True}, "would reach one replica alone"),
        ({"batch_row": 1}, "batch-row"),
    ):
        with pytest.raises(SettingsError, match=text):
            app({"settings": {"models": models, **more}})
