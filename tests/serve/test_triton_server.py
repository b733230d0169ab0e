"""A repository in Triton itself: rows of several adapters in one batch, streams, errors."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.documents import ROOT
from support.serving import START, Server, serving
from support.triton import SITE, Held, needs_triton, triton
from support.waiting import DEADLINE, wait_until

from loraexport_serve.cli import main

pytestmark = [
    needs_triton,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
CLIENT = ROOT / "tests/serve/triton_client.py"
TEXTS = ("hello world", "a batch of adapters", "hello", "the slots of a model")
ADAPTERS = ("sql", "chat", "legal", "")
TENANTS = ("first", "second", "")
SAMPLED = {"temperature": 1.0, "seed": 7}
LONG = {
    "max_tokens": 120,
    "ignore_eos": True,
    "guided_regex": "[a-z ]*",
    "seed": 0,
    "temperature": 1.0,
}


class Pair:
    """Triton, and the server that its models ask."""

    def __init__(self, server: Server, triton: httpx.Client, grpc: str) -> None:
        self.server, self._triton, self._grpc = server, triton, grpc

    def infer(
        self, texts: list[str], adapters: list[str], model: str = "tiny", **parameters: Any
    ) -> np.ndarray:
        """A vector of each text. Raises RuntimeError: what Triton says of an error."""
        inputs = [
            {"name": name, "shape": [len(values), 1], "datatype": "BYTES", "data": values}
            for name, values in (("TEXT", texts), ("ADAPTER", adapters))
        ]
        body = {"inputs": inputs, "parameters": parameters}
        answer = self._triton.post(f"/v2/models/{model}/infer", json=body)
        if not answer.is_success:
            raise RuntimeError(answer.json()["error"])
        (output,) = answer.json()["outputs"]
        assert output["name"] == "EMBEDDING"
        return np.array(output["data"], np.float32).reshape(output["shape"])

    def pieces(self, prompt: str, adapter: str, **parameters: Any) -> Iterator[str]:
        """Of a stream, as they come. Raises RuntimeError: what Triton says of an error."""
        body = {"PROMPT": prompt, "ADAPTER": adapter, "parameters": parameters}
        path = "/v2/models/llama/generate_stream"
        with self._triton.stream("POST", path, json=body) as answer:
            for line in answer.iter_lines():
                if line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(event["error"])
                    yield event["TEXT"]

    def leave(self, prompt: str, adapter: str, **parameters: Any) -> None:
        """Ask for a stream, and go before it has begun, or soon after."""
        body = {"PROMPT": prompt, "ADAPTER": adapter, "parameters": parameters}
        path = "/v2/models/llama/generate_stream"
        with suppress(httpx.ReadTimeout):
            self._triton.post(path, json=body, timeout=0.1)

    def expected(self, text: str, adapter: str) -> np.ndarray:
        """The vector as the server has it."""
        model = f"tiny:{adapter}" if adapter else "tiny"
        answer = self.server.post("/v1/embeddings", model=model, input=text).raise_for_status()
        return np.array(answer.json()["data"][0]["embedding"], np.float32)

    def completed(self, prompt: str, adapter: str, **parameters: Any) -> str:
        """The whole text as the server has it."""
        model = f"llama:{adapter}" if adapter else "llama"
        answer = self.server.post("/v1/completions", model=model, prompt=prompt, **parameters)
        text: str = answer.raise_for_status().json()["choices"][0]["text"]
        return text

    def call(self, *calls: dict[str, Any]) -> list[dict[str, Any]]:
        """What Triton's own client gets by gRPC (tests/serve/triton_client.py)."""
        told = subprocess.run(
            [sys.executable, str(CLIENT), self._grpc],
            input="".join(f"{json.dumps(call)}\n" for call in calls),
            stdout=subprocess.PIPE,
            text=True,
            timeout=START,
            check=True,
            env=os.environ | {"PYTHONPATH": str(SITE)},
        ).stdout
        return [json.loads(line) for line in told.splitlines()]

    def statistics(self, model: str) -> dict[str, Any]:
        """What Triton counts of a model."""
        answer = self._triton.get(f"/v2/models/{model}/stats").raise_for_status()
        counted: dict[str, Any] = answer.json()["model_stats"][0]
        return counted

    def metric(self, name: str) -> float:
        """Of the server, summed over its labels."""
        text = self.server.get("/metrics").text
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def is_over(self) -> bool:
        """Whether the server computes nothing any more."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(map(self.metric, names)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def held(folder: Path) -> Iterator[Held]:
    """What the model `held` asks."""
    vector = base64.b64encode(np.ones(32, np.float32).tobytes()).decode()
    with Held(folder / "held.sock", {"data": [{"embedding": vector}]}) as server:
        yield server


@pytest.fixture(scope="module")
def pair(encoder: Path, decoder: Path, folder: Path) -> Iterator[Pair]:
    socket, repository = folder / "serve.sock", folder / "repository"
    for name, artifact in (("tiny", encoder), ("llama", decoder)):
        arguments = ["triton", str(artifact), "--name", name, "--out", str(repository)]
        assert main([*arguments, "--socket", str(socket)]) == 0
    arguments = ["triton", str(encoder), "--name", "held", "--out", str(repository)]
    arguments += ["--socket", str(folder / "held.sock"), "--rows", "1"]
    assert main([*arguments, "--most-queued", "2", "--timeout", "0.2"]) == 0
    settings = folder / "settings.yaml"
    settings.write_text(
        f"models:\n  tiny: {{path: {encoder}, adapter_folder: {encoder.parents[1]}}}\n"
        f"  llama: {{path: {decoder}, rows: 4}}\nsocket: {socket}\n"
    )
    with (
        serving("--config", str(settings)) as server,
        triton(repository, folder) as (http, grpc),
        httpx.Client(base_url=f"http://{http}", timeout=60, trust_env=False) as client,
    ):
        yield Pair(server, client, grpc)


def test_rows_of_one_request_and_requests_of_one_batch(pair: Pair) -> None:
    """Each row is that of its text alone, under its adapter; the adapters differ."""
    alone = [pair.expected(text, name) for text, name in zip(TEXTS, ADAPTERS, strict=True)]
    mixed = pair.infer(list(TEXTS), list(ADAPTERS))
    np.testing.assert_allclose(mixed, alone, atol=1e-5)
    base = pair.infer(list(TEXTS), [""] * 4)
    assert (np.abs(mixed - base).max(axis=1)[:3] > 1e-4).all()
    jobs = [(text, name) for text in TEXTS for name in ADAPTERS] * 4
    before = pair.statistics("tiny")
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(lambda job: pair.infer([job[0]], [job[1]])[0], jobs))
    wanted = {job: pair.expected(*job) for job in set(jobs)}
    for job, row in zip(jobs, rows, strict=True):
        np.testing.assert_allclose(row, wanted[job], atol=1e-5)
    after = pair.statistics("tiny")
    counted = {
        key: after[f"{key}_count"] - before[f"{key}_count"] for key in ("inference", "execution")
    }
    assert counted["inference"] == len(jobs)
    assert counted["execution"] < len(jobs), "requests share batches"


def test_what_the_server_refuses_is_a_tritons_error(pair: Pair) -> None:
    for texts, adapters, parameters, text in (
        (["hello"], ["nobody"], {}, "`tiny:nobody` does not exist"),
        (["hello " * 90], ["sql"], {}, "maximum context length is 64 tokens"),
        (["hello"], ["sql"], {"encoding_format": "float"}, "is no parameter here"),
        (["hello"], ["sql"], {"tempo": 3}, "tempo is not supported here"),
    ):
        with pytest.raises(RuntimeError, match=text):
            pair.infer(texts, adapters, **parameters)
    cut = pair.infer(["hello " * 90], ["sql"], truncate_prompt_tokens=8)
    np.testing.assert_allclose(cut, pair.infer(["hello " * 6], ["sql"]), atol=1e-5)


def test_the_queue_is_bounded(pair: Pair, held: Held) -> None:
    """Too many are refused at once, who waits too long when its turn comes; others are answered."""

    def ask() -> str:
        try:
            vectors = pair.infer(["hello"], [""], model="held")
        except RuntimeError as error:
            return str(error)
        assert vectors.shape == (1, 32)
        return "answered"

    with ThreadPoolExecutor(24) as threads:
        asked = [threads.submit(ask) for _ in range(24)]
        for _ in range(2):  # each instance has one, until it is let go
            assert held.asked.acquire(timeout=DEADLINE)
        (refused, *_), _ = wait(asked, DEADLINE, FIRST_COMPLETED)
        assert "Exceeds maximum queue size" in refused.result()
        wait_until(lambda: sum(future.done() for future in asked) > 12)
        time.sleep(0.3)  # longer than those in the queue may wait
        held.go.set()
    answers = Counter(future.result().partition(" ")[0] for future in asked)
    assert answers["answered"] >= 2
    assert answers["Request"] >= 1, "it has waited too long"


@pytest.mark.parametrize("more", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streams_of_several_adapters_at_once(pair: Pair, more: dict[str, Any]) -> None:
    """Each is what the server answers to it alone."""
    jobs = [(text, name) for text in TEXTS for name in TENANTS]
    asked = {"max_tokens": 24, "ignore_eos": True, **more}
    with ThreadPoolExecutor(len(jobs)) as threads:
        texts = list(threads.map(lambda job: "".join(pair.pieces(*job, **asked)), jobs))
    assert texts == [pair.completed(*job, **asked) for job in jobs]
    assert len(set(texts)) > len(jobs) / 2, "the adapters differ"


def test_what_the_server_refuses_ends_a_stream(pair: Pair) -> None:
    """With an error as its one event; a good stream beside it goes on."""
    good = pair.pieces("hello", "first", max_tokens=40, ignore_eos=True)
    begun = next(good)
    for prompt, adapter, parameters, text in (
        ("hello", "nobody", {}, "`llama:nobody` does not exist"),
        ("hello " * 200, "first", {}, "maximum context length is 128 tokens"),
        ("hello", "first", {"stream": False}, "stream is no parameter here"),
        ("hello", "first", {"logprobs": 1}, "logprobs is no parameter here"),
        ("hello", "first", {"tempo": 3}, "tempo is not supported here"),
        ("hello", "first", {"temperature": -1.0}, ">= 0.0"),
    ):
        with pytest.raises(RuntimeError, match=text):
            list(pair.pieces(prompt, adapter, **parameters))
    wanted = pair.completed("hello", "first", max_tokens=40, ignore_eos=True)
    assert begun + "".join(good) == wanted


def test_clients_that_go_end_their_streams(pair: Pair) -> None:
    """Begun, or in the queue: the server computes no more of them, and their rows are others'."""
    before = pair.metric("loraexport_decoder_cancelled_total")
    begun = [pair.pieces("hello", name, **LONG) for name in TENANTS]
    for stream in begun:
        assert next(stream)
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda name: pair.leave("hello", name, **LONG), TENANTS * 4))
    for stream in begun:
        stream.close()  # type: ignore[attr-defined]

    wait_until(pair.is_over)
    assert pair.metric("loraexport_decoder_cancelled_total") > before
    asked = {"max_tokens": 8, "ignore_eos": True}
    text = "".join(pair.pieces("hello", "second", **asked))
    assert text == pair.completed("hello", "second", **asked)


def test_by_grpc(pair: Pair) -> None:
    """As by HTTP: rows of several adapters, errors, streams on one connection, clients that go."""
    jobs = [(text, name, {"max_tokens": 24, **SAMPLED}) for text in TEXTS for name in TENANTS]
    cut = {"truncate_prompt_tokens": 8}
    before = pair.metric("loraexport_decoder_cancelled_total")
    rows, short, unknown, invalid, streams, failed, left = pair.call(
        {"texts": TEXTS, "adapters": ADAPTERS, "parameters": {}},
        {"texts": ["hello " * 90], "adapters": ["sql"], "parameters": cut},
        {"texts": ["hello"], "adapters": ["nobody"], "parameters": {}},
        {"texts": ["hello"], "adapters": ["sql"], "parameters": {"tempo": 3}},
        {"streams": jobs},
        {"streams": [("hello", "nobody", {})]},
        {"streams": [("hello", name, LONG) for name in TENANTS * 4], "leave": True},
    )
    alone = [pair.expected(text, name) for text, name in zip(TEXTS, ADAPTERS, strict=True)]
    np.testing.assert_allclose(rows["rows"], alone, atol=1e-5)
    np.testing.assert_allclose(short["rows"], pair.infer(["hello " * 6], ["sql"]), atol=1e-5)
    assert unknown["status"] == "StatusCode.NOT_FOUND"
    assert "`tiny:nobody` does not exist" in unknown["error"]
    assert invalid["status"] == "StatusCode.INVALID_ARGUMENT"
    assert "tempo is not supported here" in invalid["error"]
    wanted = [{"text": pair.completed(text, name, **more)} for text, name, more in jobs]
    assert streams["ends"] == wanted
    assert "`llama:nobody` does not exist" in failed["ends"][0]["error"]
    assert left["ends"] is None
    wait_until(pair.is_over)
    assert pair.metric("loraexport_decoder_cancelled_total") > before
