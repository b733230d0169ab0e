"""A repository in Triton itself: rows of several adapters in one batch, errors, streams."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.serving import serving
from support.triton import find_triton, triton

from loraexport_serve.cli import main

pytestmark = pytest.mark.slow
TEXTS = ("hello world", "a batch of adapters", "hello", "the slots of a model")
ADAPTERS = ("sql", "chat", "legal", "")


@pytest.fixture(scope="module")
def address(
    encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, httpx.Client]]:
    """Triton's HTTP, and a client of the server that its model asks."""
    site, folder = find_triton(), tmp_path_factory.mktemp("triton")
    socket = folder / "serve.sock"
    arguments = ["triton", str(encoder), "--name", "tiny", "--out", str(folder / "repository")]
    assert main([*arguments, "--socket", str(socket)]) == 0
    settings = folder / "settings.yaml"
    settings.write_text(
        f"models:\n  tiny: {{path: {encoder}, adapter_folder: {encoder.parents[1]}}}\n"
        f"socket: {socket}\n"
    )
    with (
        serving("--config", str(settings)) as server,
        triton(site, folder / "repository", folder) as there,
    ):
        yield there, server.client


def infer(address: str, texts: list[str], adapters: list[str], **parameters: Any) -> np.ndarray:
    """What Triton's own client is answered: a vector for each text."""
    http = pytest.importorskip("tritonclient.http")
    with http.InferenceServerClient(address) as client:
        inputs = []
        for name, values in (("TEXT", texts), ("ADAPTER", adapters)):
            data = np.array([[value.encode()] for value in values], dtype=np.object_)
            inputs.append(http.InferInput(name, data.shape, "BYTES"))
            inputs[-1].set_data_from_numpy(data)
        answer = client.infer("tiny", inputs, parameters=parameters or None)
    vectors: np.ndarray = answer.as_numpy("EMBEDDING")
    return vectors


def expected(client: httpx.Client, text: str, adapter: str) -> np.ndarray:
    """The server's own answer."""
    body = {"model": f"tiny:{adapter}" if adapter else "tiny", "input": text}
    answer = client.post("/v1/embeddings", json=body).raise_for_status()
    return np.array(answer.json()["data"][0]["embedding"], np.float32)


def test_rows_of_one_request_and_requests_of_one_batch(address: tuple[str, httpx.Client]) -> None:
    """Each row is that of its text alone, under its adapter; the adapters differ."""
    there, server = address
    alone = [expected(server, text, name) for text, name in zip(TEXTS, ADAPTERS, strict=True)]
    mixed = infer(there, list(TEXTS), list(ADAPTERS))
    np.testing.assert_allclose(mixed, alone, atol=1e-5)
    base = infer(there, list(TEXTS), [""] * 4)
    assert (np.abs(mixed - base).max(axis=1)[:3] > 1e-3).all()
    jobs = [(text, name) for text in TEXTS for name in ADAPTERS] * 4
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(lambda job: infer(there, [job[0]], [job[1]])[0], jobs))
    wanted = {job: expected(server, *job) for job in set(jobs)}
    for job, row in zip(jobs, rows, strict=True):
        np.testing.assert_allclose(row, wanted[job], atol=1e-5)
    stats = httpx.get(f"http://{there}/v2/models/tiny/stats").json()["model_stats"][0]
    assert stats["inference_count"] == 8 + len(jobs)
    assert stats["execution_count"] < 2 + len(jobs), "requests share batches"


def test_what_the_server_refuses_is_a_tritons_error(address: tuple[str, httpx.Client]) -> None:
    there, _ = address
    errors = pytest.importorskip("tritonclient.utils")
    for texts, adapters, parameters, text in (
        (["hello"], ["nobody"], {}, "`tiny:nobody` does not exist"),
        (["hello " * 90], ["sql"], {}, "maximum context length is 64 tokens"),
        (["hello"], ["sql"], {"encoding_format": "float"}, "is no parameter here"),
        (["hello"], ["sql"], {"tempo": 3}, "tempo is not supported here"),
    ):
        with pytest.raises(errors.InferenceServerException, match=text):
            infer(there, texts, adapters, **parameters)
    cut = infer(there, ["hello " * 90], ["sql"], truncate_prompt_tokens=8)
    np.testing.assert_allclose(cut, infer(there, ["hello " * 6], ["sql"]), atol=1e-5)
