"""The Python model of a Triton repository: requests of Triton -> routes of loraexport-serve.

A copy of this file is a repository's `model.py`. It asks a server at a Unix socket, with nothing
but numpy and the standard library, as the interpreter of an older Triton takes no numpy 2; or, in
a container that has `loraexport-serve`, it opens the artifact that lies beside it.
"""

import base64
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_THREADS = 64
"""Calls at the same time; the server holds its own bounds, and batches them."""
_SECONDS = 600.0
"""The server ends a request sooner, by its own limits."""
_OWN = (
    *("model", "adapters", "stream", "stream_options", "encoding_format"),
    *("n", "best_of", "echo", "logprobs"),
)
"""Keys of a body that are no parameter of a request here: the output has no place for an answer."""
Parts = list[tuple[list[int], "Future[np.ndarray]"]]
"""Rows, and the values that they will have."""
_CODES = {
    400: "INVALID_ARG",
    404: "NOT_FOUND",
    408: "UNAVAILABLE",
    413: "INVALID_ARG",
    429: "UNAVAILABLE",
    501: "UNSUPPORTED",
    503: "UNAVAILABLE",
}
_STATUSES = {
    "invalid_request_error": 400,
    "timeout_error": 408,
    "rate_limit_error": 429,
    "service_unavailable_error": 503,
}
"""Of an error inside a stream, by its type."""


class RefusedError(Exception):
    """What the server answered in place of what was asked for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class SocketServer:
    """A server at a Unix socket; any thread may call."""

    def __init__(self, path: str, key_file: str) -> None:
        self._path = path
        self._headers = {"content-type": "application/json"}
        if key_file:
            key = Path(key_file).read_text(encoding="ascii").strip()
            self._headers["authorization"] = f"Bearer {key}"

    def is_ready(self) -> bool:
        try:
            with closing(self._open()) as connection:
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
        except OSError:
            return False

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and the body of an answer. Raises RefusedError: nobody is there."""
        try:
            with closing(self._open()) as connection:
                connection.request("POST", path, body, self._headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from error

    def stream(self, path: str, body: bytes) -> Generator[tuple[int, bytes], None, None]:
        """The status and each line of an answer. Raises RefusedError."""
        try:
            with closing(self._open()) as connection:
                connection.request("POST", path, body, self._headers)
                answer = connection.getresponse()
                for line in answer:
                    yield answer.status, line
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from error

    def close(self) -> None:
        """Nothing is kept."""

    def _open(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(_SECONDS)
        try:
            connection.sock.connect(self._path)
        except OSError:
            connection.close()
            raise
        return connection

    def _gone(self, error: Exception) -> RefusedError:
        return RefusedError(503, f"the server at {self._path} does not answer: {error}")


class TritonPythonModel:
    """Triton's interface; one instance."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        values = {key: one["string_value"] for key, one in config["parameters"].items()}
        self._kind, self._model = values["KIND"], values["MODEL"]
        (self._output,) = (one["name"] for one in config["output"])
        self._server: Any
        if values["SOCKET"]:
            self._server = SocketServer(values["SOCKET"], values["KEY_FILE"])
        else:
            from loraexport_serve.triton.process import ProcessServer

            folder = os.path.join(args["model_repository"], args["model_version"], "artifact")
            on_gpu = args["model_instance_kind"] == "GPU"
            self._server = ProcessServer(self._model, folder, on_gpu)
        self._threads = ThreadPoolExecutor(_THREADS, "loraexport")
        if self._kind == "generate":  # Triton has no queue before a decoupled model
            self._room = threading.Semaphore(_THREADS + int(values["MOST_QUEUED"]))
            self._patience = float(values["TIMEOUT"])

    def is_ready(self) -> bool:
        """Asked by a Triton of 2026 or newer."""
        return bool(self._server.is_ready())

    def execute(self, requests: list[Any]) -> list[Any] | None:
        if self._kind == "generate":
            for request in requests:
                self._begin(request, request.get_response_sender())
            return None  # answers go by the senders
        started = [self._start(request) for request in requests]  # all, so that they share batches
        return [self._finish(parts) for parts in started]

    def finalize(self) -> None:
        self._threads.shutdown(wait=True)
        self._server.close()

    def _start(self, request: Any) -> Parts | Exception:
        """The rows of each adapter that a request names, and what is asked for them."""
        try:
            texts, names = _strings(request, "TEXT"), _strings(request, "ADAPTER")
            pairs = _strings(request, "TEXT_PAIR") if self._kind == "score" else []
            more = _parameters(request)
        except Exception as error:
            return error
        parts = []
        for name in dict.fromkeys(names):
            rows = [index for index, one in enumerate(names) if one == name]
            chosen = [texts[row] for row in rows], [pairs[row] for row in rows if pairs]
            parts.append((rows, self._threads.submit(self._ask, name, *chosen, more)))
        return parts

    def _finish(self, parts: Parts | Exception) -> Any:
        """A request's answer."""
        try:
            if isinstance(parts, Exception):
                raise parts
            values = [(rows, future.result()) for rows, future in parts]
            shape = (sum(len(rows) for rows, _ in parts), *values[0][1].shape[1:])
            result = np.empty(shape, np.float32)
            for rows, value in values:
                result[rows] = value
            return pb_utils.InferenceResponse([pb_utils.Tensor(self._output, result)])
        except Exception as error:
            return pb_utils.InferenceResponse(error=_error(error))

    def _ask(
        self, adapter: str, texts: list[str], pairs: list[str], more: dict[str, Any]
    ) -> np.ndarray:
        """float32 [rows, …] of texts under one adapter."""
        body: dict[str, Any] = {**more, "model": self._name(adapter)}
        match self._kind:
            case "embed":
                body |= {"input": texts, "encoding_format": "base64"}
                data = self._post("/v1/embeddings", body)
                vectors = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in data]
                return np.stack(vectors)
            case "score":
                data = self._post("/v1/score", body | {"text_1": texts, "text_2": pairs})
                return np.array([[one["score"]] for one in data], np.float32)
            case _:
                data = self._post("/v1/classify", body | {"input": texts})
                return np.array([one["probs"] for one in data], np.float32)

    def _post(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        status, answer = self._server.post(path, json.dumps(body).encode())
        read = json.loads(answer)
        if status != 200:
            raise RefusedError(status, read["error"]["message"])
        data: list[dict[str, Any]] = read["data"]
        return data

    def _begin(self, request: Any, sender: Any) -> None:
        """Have a thread answer, unless too many wait for one."""
        if self._room.acquire(blocking=False):
            self._threads.submit(self._generate, request, sender, time.monotonic())
        else:
            _end(sender, RefusedError(429, "the queue is full"))

    def _generate(self, request: Any, sender: Any, since: float) -> None:
        """Pieces of text as they come, then the end; an error is a response too."""
        failed = None
        try:
            if time.monotonic() - since > self._patience:
                raise RefusedError(408, f"no room for it came within {self._patience:g} s")
            (prompt,), (name,) = _strings(request, "PROMPT"), _strings(request, "ADAPTER")
            body = {**_parameters(request), "model": self._name(name), "prompt": prompt}
            with closing(self._pieces(body | {"stream": True})) as pieces:
                for piece in pieces:
                    if sender.is_cancelled():
                        break  # the closed connection cancels what is left
                    text = np.array([piece.encode()], dtype=np.object_)
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor(self._output, text)]))
        except Exception as error:
            failed = error
        self._room.release()
        _end(sender, failed)

    def _pieces(self, body: dict[str, Any]) -> Generator[str, None, None]:
        with closing(self._server.stream("/v1/completions", json.dumps(body).encode())) as lines:
            for status, line in lines:
                if status != 200:
                    raise RefusedError(status, json.loads(line)["error"]["message"])
                data = line.decode().strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    error = event["error"]
                    raise RefusedError(_STATUSES.get(error["type"], 500), error["message"])
                yield from (choice["text"] for choice in event["choices"] if choice["text"])

    def _name(self, adapter: str) -> str:
        return f"{self._model}:{adapter}" if adapter else self._model


def _strings(request: Any, name: str) -> list[str]:
    values = pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _parameters(request: Any) -> dict[str, Any]:
    """A request's parameters, which are keys of the route's body; the route refuses others."""
    given: dict[str, Any] = json.loads(request.parameters() or "{}")
    given.pop("binary_data_output", None)  # of Triton's own HTTP client
    for key in given:
        if key in _OWN:
            raise RefusedError(400, f"{key} is no parameter here")
    return given


def _end(sender: Any, error: Exception | None) -> None:
    """A stream's last response, which is an error or nothing."""
    if error is not None:
        sender.send(pb_utils.InferenceResponse(error=_error(error)))
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _error(error: Exception) -> Any:
    status = error.status if isinstance(error, RefusedError) else 500
    if isinstance(error, UnicodeDecodeError):
        status = 400
    code = getattr(pb_utils.TritonError, _CODES.get(status, "INTERNAL"))
    return pb_utils.TritonError(str(error), code)
