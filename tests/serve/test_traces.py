"""A span of each request: its names, its parent, what it counts, and that it quotes nothing."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.inside import Inside, inside
from support.serving import serving
from support.waiting import wait_until

from loraexport_serve.config.schema import Settings
from loraexport_serve.errors import SettingsError
from loraexport_serve.metrics import traces as module
from loraexport_serve.metrics.traces import Traces, open_traces

pytest.importorskip("opentelemetry.sdk")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
SECRET = "a very private text"
ENDPOINT = "http://127.0.0.1:4318/v1/traces"


class Told:
    """A server, and the spans that it has ended."""

    def __init__(self, server: Inside, exporter: Any) -> None:
        self.server, self._exporter = server, exporter

    def span(self, method: str, path: str, body: Any = None) -> Any:
        """That of one request."""
        self._exporter.clear()
        self.answer = self.server.client.request(method, path, json=body, headers=HEADERS)
        wait_until(lambda: len(self._exporter.get_finished_spans()) > 0)
        (span,) = self._exporter.get_finished_spans()
        assert SECRET not in span.to_json()
        return span


@pytest.fixture(scope="module")
def told(encoder: Path, decoder: Path) -> Iterator[Told]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    models = {"tiny": str(encoder), "llama": str(decoder)}
    with inside(Traces(provider), models=models) as server:
        yield Told(server, exporter)


def test_an_embedding(told: Told) -> None:
    span = told.span("POST", "/v1/embeddings", {"model": "sql", "input": [SECRET, "hello"]})
    assert span.name == "embeddings sql"
    assert span.kind.name == "SERVER"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert 0 < span.end_time - span.start_time < 60e9
    host, port = told.server.address
    attributes = dict(span.attributes)
    assert attributes.pop("loraexport.queue_seconds") >= 0
    assert attributes == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "loraexport",
        "gen_ai.request.model": "sql",
        "gen_ai.usage.input_tokens": told.answer.json()["usage"]["prompt_tokens"],
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/embeddings",
        "loraexport.adapter": "sql",
        "loraexport.artifact": "tiny",
        "loraexport.request_id": "mine",
        "server.address": host,
        "server.port": port,
        "url.scheme": "http",
    }
    assert span.status.status_code.name == "UNSET"


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_a_chat(told: Told, stream: bool) -> None:
    messages = [{"role": "user", "content": SECRET}]
    body = {"model": "first", "messages": messages, "max_tokens": 3, "n": 2, "stream": stream}
    span = told.span("POST", "/v1/chat/completions", body)
    assert span.name == "chat first"
    assert span.attributes["gen_ai.usage.output_tokens"] == 6
    assert span.attributes["gen_ai.usage.input_tokens"] > 0
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length", "length")


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"model": "llama", "prompt": SECRET}, "text_completion llama"),
        ("/tokenize", {"model": "tiny:chat", "prompt": SECRET}, "tokenize tiny:chat"),
        ("/v1/score", {"model": "chat", "text_1": SECRET, "text_2": "a"}, "score chat"),
    ],
)
def test_other_routes(told: Told, path: str, body: Any, name: str) -> None:
    assert told.span("POST", path, body).name == name


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"model": SECRET, "input": "a"}, 404, "model_not_found"),
        ({"model": "sql", "input": ["a", 3]}, 400, "invalid_request"),
        ({"model": "sql", "input": "a", SECRET: 3}, 400, "invalid_request"),
    ],
)
def test_a_refusal(told: Told, body: Any, status: int, error: str) -> None:
    span = told.span("POST", "/v1/embeddings", body)
    assert span.attributes["http.response.status_code"] == status
    assert span.attributes["error.type"] == error
    assert span.status.status_code.name == "UNSET"  # it is the client's


def test_a_fault_of_the_server(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told.server.host("tiny"), "run", None)
    span = told.span("POST", "/v1/embeddings", {"model": "sql", "input": "a"})
    assert (span.attributes["error.type"], span.status.status_code.name) == ("failed", "ERROR")


def test_probes_have_none(told: Told) -> None:
    told.server.client.get("/readyz")
    assert told.span("GET", "/v1/models").name == "GET /v1/models"


class Collector(BaseHTTPRequestHandler):
    got: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        size = int(self.headers["content-length"])
        self.got.append((self.path, self.rfile.read(size)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_collector_gets_them_by_the_end(encoder: Path) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    handler = type("Handler", (Collector,), {"got": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
            flags = [f"tiny={encoder}", "--otlp-traces-endpoint", url]
            with serving(*flags, OTEL_SERVICE_NAME="ours") as server:
                assert server.post("/v1/embeddings", model="sql", input="a").is_success
        finally:
            collector.shutdown()
            thread.join()
    ((path, data),) = handler.got
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(data).resource_spans
    names = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert names["service.name"] == "ours"
    assert [span.name for span in resource.scope_spans[0].spans] == ["embeddings sql"]


def test_a_collector_that_takes_nothing_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_TO_SEND", 0.01)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", ENDPOINT)
    traces = open_traces(Settings(models={"a": "a"}), os.environ)
    assert traces is not None
    free = threading.Event()
    monkeypatch.setattr(traces._provider, "shutdown", free.wait)
    traces.close()
    assert not free.is_set()
    free.set()
    monkeypatch.undo()
    traces.close()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SERVICE_NAME": "a", "OTEL_TRACES_EXPORTER": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_unless_asked_for(variables: dict[str, str]) -> None:
    assert open_traces(Settings(models={"a": "a"}), variables) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_EXPORTER", "console"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
)
def test_what_is_not_spoken_is_refused(name: str, value: str) -> None:
    settings = Settings(models={"a": "a"}, otlp_traces_endpoint=ENDPOINT)
    with pytest.raises(SettingsError, match=f"{name}: got '{value}'"):
        open_traces(settings, {name: value})


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A setting is an error; a variable, which a cluster gives to all, is not."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    settings = Settings(models={"a": "a"}, otlp_traces_endpoint=ENDPOINT)
    with pytest.raises(SettingsError, match=r"pip install 'loraexport-serve\[traces\]'"):
        open_traces(settings, {})
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}
    assert open_traces(Settings(models={"a": "a"}), given) is None
    assert "loraexport-serve[traces]" in caplog.text
