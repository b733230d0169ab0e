"""A span of OpenTelemetry for each request, with `gen_ai.*` attributes; off unless configured.

Names: https://opentelemetry.io/docs/specs/semconv/gen-ai/ and /http/. No text of a request is told.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraexport_runtime.contract.strict_yaml import Problem

from ..config.schema import Settings
from ..errors import SettingsError
from ..version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_LOG = logging.getLogger(__name__)
_NAME = "loraexport-serve"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""The conventions' own names; of another route it is the last part of its path."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_TO_SEND = 5.0
"""Seconds, at the end, for spans that were not sent yet."""


@dataclass
class Outcome:
    """What is told of a request beside its status, as far as it has come."""

    waited: float = 0.0
    """Seconds in the queue."""
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    reasons: tuple[str, ...] = ()
    """Why each answer has ended."""
    error: str | None = None
    """The code of a refusal, also of one inside a stream."""


class Traces:
    """Where spans go; each is made when its request is over, so that nothing is kept till then."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(_NAME, __version__)

    def note(
        self,
        scope: Mapping[str, Any],
        route: str,
        status: int,
        seconds: float,
        outcome: Outcome,
        told: Mapping[str, str | None],
    ) -> None:
        """A request has ended now, after so many seconds.

        Args:
            scope: of ASGI; its `traceparent` is the span's parent.
            route: its path.
            status: 499 of a client that has gone.
            told: more attributes; those that are None are left out. With
                `gen_ai.request.model` it is a request to a model.
        """
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end = time.time_ns()
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "url.scheme": scope["scheme"],
            **{name: value for name, value in told.items() if value is not None},
        }
        if server := scope.get("server"):
            attributes["server.address"] = server[0]
            if server[1] is not None:
                attributes["server.port"] = server[1]
        name = f"{scope['method']} {route}"
        if (model := told.get("gen_ai.request.model")) is not None:
            operation = _OPERATIONS.get(route) or route.rpartition("/")[2]
            attributes |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "loraexport"}
            name = f"{operation} {model}"
        if outcome.prompt_tokens is not None:
            attributes["gen_ai.usage.input_tokens"] = outcome.prompt_tokens
            attributes["loraexport.queue_seconds"] = outcome.waited
        if outcome.generated_tokens is not None:
            attributes["gen_ai.usage.output_tokens"] = outcome.generated_tokens
        if outcome.reasons:
            attributes["gen_ai.response.finish_reasons"] = outcome.reasons
        error = outcome.error or (str(status) if status >= 400 else None)
        if error is not None:
            attributes["error.type"] = error
        span = self._tracer.start_span(
            name,
            propagate.extract(_carrier(scope["headers"])),
            SpanKind.SERVER,
            attributes,
            start_time=end - round(seconds * 1e9),
        )
        if status >= 500 or (outcome.error is not None and status < 400):
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """Send what is left, as far as the collector takes it in a while."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(_TO_SEND)


def open_traces(settings: Settings, variables: Mapping[str, str]) -> Traces | None:
    """Spans to a collector by OTLP over HTTP, in batches; None: nobody has asked for it.

    Args:
        variables: the process's environment; the SDK reads its own OTEL_* from there too.

    Raises:
        SettingsError: what is asked for cannot be done.
    """
    endpoint = settings.otlp_traces_endpoint
    exporter = variables.get("OTEL_TRACES_EXPORTER") or None
    if variables.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return None
    if endpoint is None and exporter is None and not any(map(variables.get, _ENDPOINTS)):
        return None
    problems = []
    if exporter not in (None, "otlp"):
        problems.append(_problem("OTEL_TRACES_EXPORTER", exporter, "otlp or none"))
    protocol = next(filter(None, map(variables.get, _PROTOCOLS)), _PROTOCOL)
    if protocol != _PROTOCOL:
        problems.append(_problem("OTEL_EXPORTER_OTLP_PROTOCOL", protocol, _PROTOCOL))
    if problems:
        raise SettingsError("traces", problems)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        hint = "pip install 'loraexport-serve[traces]'"
        if endpoint is None:  # of variables that a cluster gives to everybody
            _LOG.warning("no traces are sent: OTEL_* ask for them, and they need %s", hint)
            return None
        problem = Problem(1, "otlp_traces_endpoint", "opentelemetry is not installed", hint)
        raise SettingsError("traces", [problem]) from error
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        own = {"service.name": _NAME, "service.version": __version__}
        resource = resource.merge(Resource(own))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Traces(provider)


def _problem(name: str, value: str | None, expected: str) -> Problem:
    return Problem(1, name, f"got {value!r}", f"expected {expected}")


def _carrier(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
