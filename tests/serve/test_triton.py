"""The repositories that are written, and their model where it opens the artifact by itself."""

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.home import Home
from support.serving import ALL, Server, serving, write_encoder
from support.waiting import DEADLINE

import loraexport_serve
from loraexport_serve.cli import main

THREADS = 64
"""Of a model."""
TEXTS = ("hello world", "a batch of adapters", "hello")


@pytest.fixture
def utilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Triton's own module, which its interpreter alone has."""
    module: Any = ModuleType("triton_python_backend_utils")
    codes = {code: code for code in ("INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "INTERNAL")}
    error = type(
        "TritonError", (), {**codes, "__init__": lambda self, *said: setattr(self, "said", said)}
    )
    module.TritonError = error
    module.Tensor = lambda name, values: SimpleNamespace(name=name, values=values)
    module.InferenceResponse = lambda tensors=(), error=None: SimpleNamespace(
        tensors=tensors, error=error
    )
    module.get_input_tensor_by_name = lambda request, name: SimpleNamespace(
        as_numpy=lambda: request.inputs[name]
    )
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = "end"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def request(parameters: dict[str, Any] | None = None, **inputs: list[str]) -> SimpleNamespace:
    arrays = {
        name: np.array([[value.encode()] for value in values], dtype=np.object_)
        for name, values in inputs.items()
    }
    return SimpleNamespace(inputs=arrays, parameters=lambda: json.dumps(parameters or {}))


class Stream:
    """A request of a decoder, and the responses to it."""

    def __init__(self, name: str, **parameters: Any) -> None:
        asked = request(parameters, PROMPT=["hello"], ADAPTER=[name])
        self.inputs, self.parameters = asked.inputs, asked.parameters
        self.pieces: list[str] = []
        self.error: tuple[str, str] | None = None
        self.is_left = False
        self._is_over = threading.Event()

    def get_response_sender(self) -> "Stream":
        return self

    def is_cancelled(self) -> bool:
        return self.is_left

    def send(self, response: Any = None, flags: str | None = None) -> None:
        assert not self._is_over.is_set(), "nothing follows the end"
        if response is None:
            assert flags == "end"
            self._is_over.set()
        elif response.error is not None:
            assert self.error is None
            self.error = response.error.said
        else:
            (piece,) = response.tensors[0].values
            self.pieces.append(piece.decode())

    @property
    def text(self) -> str:
        """All of it. Waits for its end."""
        assert self._is_over.wait(DEADLINE)
        return "".join(self.pieces)


@pytest.fixture
def opened(utilities: None, tmp_path: Path) -> Iterator[Any]:
    """Writes a repository of an artifact, and opens its model as Triton would."""
    models = []

    def open_model(artifact: Path, kind: str, output: str, *flags: str, **more: str) -> Any:
        arguments = ["triton", str(artifact), "--name", kind, "--out", str(tmp_path), *flags]
        assert main(arguments) == 0
        source = Path(loraexport_serve.__file__).parent / "triton/model.py"
        assert (tmp_path / kind / "1/model.py").read_bytes() == source.read_bytes()
        spec = importlib.util.spec_from_file_location("model", source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = (tmp_path / kind / "config.pbtxt").read_text()
        values = {"KIND": kind, "MODEL": kind, "SOCKET": "", "KEY_FILE": ""} | more
        for key, value in values.items():
            assert f'key: "{key}", value: {{ string_value: "{value}" }}' in config
        assert f'output [ {{ name: "{output}", data_type: TYPE_' in config
        parameters = {key: {"string_value": value} for key, value in values.items()}
        model = module.TritonPythonModel()
        said = {"parameters": parameters, "output": [{"name": output}]}
        arguments = {"model_config": json.dumps(said), "model_instance_kind": "CPU"}
        arguments |= {"model_repository": str(tmp_path / kind), "model_version": "1"}
        model.initialize(arguments)
        models.append(model)
        return model

    yield open_model
    for model in models:
        model.finalize()


def test_a_mixed_batch_in_process(opened: Any, encoder: Path, server: Server) -> None:
    """Requests of one batch, each row under its adapter; one that is refused fails alone."""
    model = opened(encoder, "embed", "EMBEDDING")
    assert model.is_ready()
    names = ["sql", "chat", ""]
    answers = model.execute(
        [
            request(TEXT=list(TEXTS), ADAPTER=names),
            request(TEXT=["hello"], ADAPTER=["nobody"]),
            request({"encoding_format": "float"}, TEXT=["hello"], ADAPTER=[""]),
            request({"truncate_prompt_tokens": 3}, TEXT=["hello hello"], ADAPTER=["sql"]),
        ]
    )
    alone = [
        server.post("/v1/embeddings", model=f"tiny:{name}" if name else "tiny", input=text)
        for text, name in zip(TEXTS, names, strict=True)
    ]
    vectors = [answer.json()["data"][0]["embedding"] for answer in alone]
    np.testing.assert_allclose(answers[0].tensors[0].values, vectors, atol=1e-5)
    assert answers[1].error.said[1] == "NOT_FOUND"
    assert answers[2].error.said == ("encoding_format is no parameter here", "INVALID_ARG")
    assert answers[3].error is None


@pytest.mark.parametrize(("name", "labels"), [("classes", 3), ("pairs", 1)])
def test_labels_and_scores_in_process(
    opened: Any, home: Home, many: Server, tmp_path: Path, name: str, labels: int
) -> None:
    artifact = home.artifact(write_encoder, task="sequence-classification", labels=labels)
    one, other = list(TEXTS[:2]), list(TEXTS[1:])
    if labels > 1:
        model = opened(artifact, "classify", "PROBABILITIES")
        assert (tmp_path / "classify/labels.txt").read_text() == "L0\nL1\nL2\n"
        (answer,) = model.execute([request(TEXT=one, ADAPTER=["sql", ""])])
        bodies = [("classify", {"input": text}) for text in one]
        key = "probs"
    else:
        model = opened(artifact, "score", "SCORE")
        (answer,) = model.execute([request(TEXT=one, TEXT_PAIR=other, ADAPTER=["sql", ""])])
        pairs = zip(one, other, strict=True)
        bodies = [("v1/score", {"text_1": first, "text_2": second}) for first, second in pairs]
        key = "score"
    wanted = [
        many.post(f"/{path}", key=ALL, model=whose, **body).json()["data"][0][key]
        for (path, body), whose in zip(bodies, (f"{name}:sql", name), strict=True)
    ]
    np.testing.assert_allclose(answer.tensors[0].values, np.reshape(wanted, (2, -1)), atol=1e-5)


def test_streams_in_process(opened: Any, decoder: Path, many: Server) -> None:
    """Each is what the server answers; who is refused is told so, who has gone gets no more."""
    model = opened(decoder, "generate", "TEXT", MOST_QUEUED="10000", TIMEOUT="60")
    asked = {"max_tokens": 24, "ignore_eos": True}
    streams = {name: Stream(name, **asked) for name in ("first", "second", "", "nobody")}
    streams["blend"] = Stream("first", adapters={"second": 1.0})
    assert model.execute(list(streams.values())) is None
    for name in ("first", "second", ""):
        whose = f"llama:{name}" if name else "llama"
        body = {"model": whose, "prompt": "hello", **asked}
        answer = many.post("/v1/completions", key=ALL, **body).json()
        assert streams[name].text == answer["choices"][0]["text"]
        assert streams[name].error is None
    assert streams["nobody"].text == streams["blend"].text == ""
    assert streams["nobody"].error is not None
    message, code = streams["nobody"].error
    assert ("`generate:nobody` does not exist" in message, code) == (True, "NOT_FOUND")
    assert streams["blend"].error == ("adapters is no parameter here", "INVALID_ARG")
    left = Stream("first", **asked)
    left.is_left = True
    model.execute([left])
    assert left.text == ""


def test_a_socket_in_place_of_the_artifact(
    opened: Any, encoder: Path, decoder: Path, tmp_path: Path
) -> None:
    """With a key; who refuses, and that nobody is there, are errors of their own."""
    socket, key = tmp_path / "serve.sock", tmp_path / "key"
    key.write_text(f"{ALL}\n")
    where = ("--socket", str(socket), "--key-file", str(key))
    more = {"SOCKET": str(socket), "KEY_FILE": str(key)}
    vectors = opened(encoder, "embed", "EMBEDDING", *where, **more)
    limits = {"MOST_QUEUED": "10000", "TIMEOUT": "60"}
    texts = opened(decoder, "generate", "TEXT", *where, **more, **limits)
    asked = {"max_tokens": 8, "ignore_eos": True}

    def answers() -> tuple[Any, Stream]:
        stream = Stream("first", **asked)
        texts.execute([stream])
        (answer,) = vectors.execute([request(TEXT=["hello"], ADAPTER=["sql"])])
        return answer, stream

    answer, stream = answers()
    assert (vectors.is_ready(), texts.is_ready(), stream.text) == (False, False, "")
    for error in (answer.error.said, stream.error):
        assert f"the server at {socket} does not answer" in error[0]
        assert error[1] == "UNAVAILABLE"
    arguments = [f"embed={encoder}", f"generate={decoder}", "--socket", str(socket)]
    with serving(*arguments, LORAEXPORT_API_KEYS=ALL) as server:
        answer, stream = answers()
        assert vectors.is_ready()
        told = server.post("/v1/embeddings", key=ALL, model="embed:sql", input="hello").json()
        np.testing.assert_allclose(
            answer.tensors[0].values, [told["data"][0]["embedding"]], atol=1e-5
        )
        body = {"model": "generate:first", "prompt": "hello", **asked}
        whole = server.post("/v1/completions", key=ALL, **body).json()
        assert stream.text == whole["choices"][0]["text"]
        refused = Stream("first", tempo=3)
        texts.execute([refused])
        assert refused.text == ""
        assert refused.error == ("tempo is not supported here", "INVALID_ARG")


def test_an_error_within_a_stream(opened: Any, decoder: Path) -> None:
    """By its type, behind what came before it."""
    limits = {"MOST_QUEUED": "10000", "TIMEOUT": "60"}
    model = opened(decoder, "generate", "TEXT", **limits)
    for kind, code in (("timeout_error", "UNAVAILABLE"), ("server_error", "INTERNAL")):
        events = [{"choices": [{"text": "a"}]}, {"error": {"type": kind, "message": "why"}}]
        lines = [(200, f"data: {json.dumps(event)}".encode()) for event in events]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model._server, "stream", lambda *_, lines=lines: _closable(lines))
            stream = Stream("first")
            model.execute([stream])
            assert (stream.text, stream.error) == ("a", ("why", code))


def _closable(lines: list[Any]) -> Iterator[Any]:
    yield from lines


def test_the_queue_of_streams_is_bounded(
    opened: Any, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton has none before a decoupled model: too many are refused, and who waits too long."""
    flags = ("--most-queued", "1", "--timeout", "0.5")
    model = opened(decoder, "generate", "TEXT", *flags, MOST_QUEUED="1", TIMEOUT="0.5")
    model._patience = DEADLINE
    go, held = threading.Event(), threading.Semaphore(0)

    def pieces(body: dict[str, Any]) -> Iterator[str]:
        held.release()
        assert go.wait(DEADLINE)
        yield "."

    monkeypatch.setattr(model, "_pieces", pieces)
    streams = [Stream("first") for _ in range(THREADS + 2)]
    model.execute(streams[:-1])
    model.execute(streams[-1:])
    assert streams[-1].text == ""
    assert streams[-1].error == ("the queue is full", "UNAVAILABLE")
    for _ in range(THREADS):
        assert held.acquire(timeout=DEADLINE)
    model._patience = 0.0
    go.set()
    assert [stream.text for stream in streams[:-2]] == ["."] * THREADS
    assert streams[-2].text == ""
    assert streams[-2].error == ("no room for it came within 0 s", "UNAVAILABLE")
    model._patience = DEADLINE
    again = Stream("first")
    model.execute([again])
    assert (again.text, again.error) == (".", None)


def test_what_is_not_written(
    home: Home, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is, and what is there stays."""
    tags = home.artifact(write_encoder, task="token-classification", labels=4)
    out = tmp_path / "repository"
    assert main(["triton", str(tags), "--out", str(out)]) == 5
    assert "whose outputs are as long as each text" in capsys.readouterr().err
    assert main(["triton", str(tmp_path), "--out", str(out)]) == 5
    assert not out.exists()
    arguments = ["triton", str(encoder), "--out", str(out), "--name", "tiny", "--socket", "/s"]
    assert main([*arguments, "--rows", "7"]) == 0
    config = (out / "tiny/config.pbtxt").read_text()
    assert "max_batch_size: 7" in config
    assert 'string_value: "/s"' in config
    assert main(arguments) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert (out / "tiny/config.pbtxt").read_text() == config
    assert [path.name for path in out.iterdir()] == ["tiny"]
    assert main(["triton", str(encoder), "--out", str(out), "--key-file", "k"]) == 2
    assert "--key-file is of the server at --socket" in capsys.readouterr().err
