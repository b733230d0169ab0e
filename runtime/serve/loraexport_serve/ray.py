"""A Ray Serve application: an ingress, and replicas that are a server each. `serve run` starts it.

The ingress sends a request to a replica that has its adapter at hand, if one has room. A request
whose replica dies is asked again of another one; a stream of which something was sent ends with an
error event.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from loraexport_runtime.contract.strict_yaml import Problem

from .config.reader import read_settings
from .embedded import Embedded
from .errors import ApiError, SettingsError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_RAYS = (
    *("host", "port", "socket", "admin_port", "admin_socket", "admin_token_file"),
    *("tls_certificate", "tls_key", "tls_client_ca"),
)
"""Settings of ports, which are Ray's."""
_ATTEMPTS = 5
_PAUSE = 0.2
"""Seconds before the second attempt; twice as long before each further one."""
_ROUTED = 64
"""Adapters of a replica that the ingress knows of; the others are served as well."""
_KEPT = ("authorization", "content-type", "x-request-id", "traceparent", "tracestate")
_DROPPED = ("content-length", "connection")
_DONE = b"data: [DONE]\n\n"
_DEAD = (RayActorError, ReplicaUnavailableError)
_ENCODER = msgspec.json.Encoder()


def app(arguments: dict[str, Any]) -> Any:
    """The application of `import_path: loraexport_serve.ray:app`.

    Args:
        arguments: `settings`, a mapping as a settings file has it, without those of ports; a
            variable LORAEXPORT_API_KEYS, or `keys_file`, is read on each replica.

    Raises:
        SettingsError: a setting is wrong, or is none of a replica's.
    """
    plain = dict(arguments.get("settings") or {})
    problems = [
        Problem(1, f"args.{key}", "unknown key", "args has settings alone")
        for key in arguments
        if key != "settings"
    ]
    problems += [
        Problem(1, f"settings.{key}", "where to listen is Ray's", "remove it")
        for key in _RAYS
        if key in plain
    ]
    if plain.get("allow_adapter_updates"):
        hint = "let adapter_folder be one that all replicas see"
        problems.append(
            Problem(1, "settings.allow_adapter_updates", "would reach one replica alone", hint)
        )
    if problems:
        raise SettingsError("args", problems)
    settings = read_settings(None, {}, plain)
    return _INGRESS.bind(settings.max_body_bytes, _REPLICAS.bind(plain))


@dataclass(frozen=True)
class _Asked:
    """A request as it travels to a replica."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    model: str


class _Routed(msgspec.Struct):
    """What the ingress reads of a body; the replica reads all of it."""

    model: str | None = None
    stream: bool | None = None


class Replica:
    """One server, and the artifacts that it has open."""

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._server = Embedded(read_settings(None, {}, settings), os.environ)
        await self._server.start()

    async def ask(self, asked: _Asked) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        reply = await self._server.ask(asked.method, asked.path, asked.headers, asked.body)
        body = await reply.body()
        await self._note(asked, reply.status)
        return reply.status, dict(reply.headers), body

    async def stream(self, asked: _Asked) -> AsyncGenerator[Any, None]:
        """Status and headers, and then the chunks of an answer."""
        reply = await self._server.ask(asked.method, asked.path, asked.headers, asked.body)
        async with aclosing(reply.chunks):
            await self._note(asked, reply.status)
            yield reply.status, dict(reply.headers)
            async for chunk in reply.chunks:
                yield chunk

    async def check_health(self) -> None:
        """Raise RuntimeError where it fails again and again: Ray starts another in its place."""
        if not self._server.is_ready:
            raise RuntimeError("requests fail here, one after the other; the log has the reason")

    async def __del__(self) -> None:
        """Ray calls it once it sends nothing more, and waits."""
        if hasattr(self, "_server"):
            await self._server.close()

    async def _note(self, asked: _Asked, status: int) -> None:
        """Tell Ray that an adapter is at hand here, once it has answered."""
        if asked.model and status == 200:
            await self._adapter(asked.model)

    @serve.multiplexed(max_num_models_per_replica=_ROUTED)  # type: ignore[untyped-decorator]
    async def _adapter(self, name: str) -> str:
        return name


class Ingress:
    """What clients reach; nothing is computed here."""

    def __init__(self, most_bytes: int, replicas: DeploymentHandle) -> None:
        self._most_bytes, self._replicas = most_bytes, replicas

    async def __call__(self, request: Request) -> Response:
        try:
            asked, is_stream = await self._read(request)
            handle = self._replicas.options(multiplexed_model_id=asked.model)
            if not is_stream:
                status, headers, body = await _again(lambda: handle.ask.remote(asked))
                return Response(body, status, _passed(headers))
            chunks, (status, headers) = await _again(lambda: _begin(handle, asked))
            return StreamingResponse(_until_broken(chunks), status, _passed(headers))
        except ApiError as error:
            return Response(
                _ENCODER.encode(error.body()), error.status, error.headers, "application/json"
            )

    async def _read(self, request: Request) -> tuple[_Asked, bool]:
        """The request, and whether a stream is asked for. Raises ApiError (404, 413)."""
        path = request.url.path
        if path in ("/", "/metrics"):
            raise ApiError(404, "Each replica has metrics of its own; Ray's are at its port.")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._most_bytes:
                message = f"the body has more than {self._most_bytes} bytes"
                raise ApiError(413, message, code="body_too_large")
            parts.append(part)
        body = b"".join(parts)
        try:
            routed = msgspec.json.decode(body, type=_Routed) if body else _Routed()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            routed = _Routed()  # the replica says what is wrong
        headers = {name: request.headers[name] for name in _KEPT if name in request.headers}
        asked = _Asked(request.method, path, headers, body, routed.model or "")
        return asked, bool(routed.stream)


async def _begin(
    handle: Any, asked: _Asked
) -> tuple[AsyncGenerator[bytes, None], tuple[int, dict[str, str]]]:
    chunks = handle.options(stream=True).stream.remote(asked)
    return chunks, await anext(chunks)


async def _again(call: Callable[[], Awaitable[T]]) -> T:
    """What a call gives, of another replica where one has died.

    Routes change nothing, so that a request may be computed twice.

    Raises:
        ApiError: 429: all replicas are busy; 503: several died at it, or there is none.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return await call()
        except BackPressureError as error:
            raise ApiError(429, "every replica's queue is full", code="queue_full") from error
        except DeploymentUnavailableError as error:
            raise ApiError(503, "there is no replica", code="unavailable") from error
        except _DEAD as error:
            _LOG.warning("a replica died at a request: %s", type(error).__name__)
            await asyncio.sleep(_PAUSE * 2**attempt)
    raise ApiError(503, f"{_ATTEMPTS} replicas died at this request", code="unavailable")


async def _until_broken(chunks: Any) -> AsyncGenerator[bytes, None]:
    """The chunks; an event with the error, as the last one, where the replica dies."""
    end = b""
    try:
        async for chunk in chunks:
            end = (end + chunk)[-len(_DONE) :]
            yield chunk
    except _DEAD:
        if end == _DONE:
            return  # it died behind the answer's end
        error = ApiError(503, "the replica died; ask again", code="replica_died")
        yield b"data: " + _ENCODER.encode(error.body()) + b"\n\n"


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in _DROPPED}


_REPLICAS = serve.deployment(
    Replica,
    name="Replica",
    max_ongoing_requests=256,  # for the batcher to choose from
    max_queued_requests=1024,
    autoscaling_config={
        "min_replicas": 2,  # so that one may die
        "max_replicas": 4,
        "target_ongoing_requests": 64,
        "downscale_delay_s": 300,
    },
    graceful_shutdown_timeout_s=40,  # above the settings' shutdown_timeout
    health_check_period_s=5,
    health_check_timeout_s=10,
)
_INGRESS = serve.deployment(
    Ingress, name="Ingress", num_replicas=1, max_ongoing_requests=2048, max_queued_requests=-1
)
