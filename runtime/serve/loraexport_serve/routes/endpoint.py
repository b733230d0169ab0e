"""One route as an ASGI application: key, phase, body, answer, errors, log and counters.

An answer is awaited beside the connection: where the client goes first it is cancelled, and what it
queued with it.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NewType, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from loraexport_runtime import ClosedError

from ..auth import ANYBODY, Caller
from ..errors import ApiError, of_error
from ..gone import ClientGoneError, unless_gone
from ..hosts.catalog import H, Target
from ..metrics.traces import Outcome, Traces
from ..service import Service

B = TypeVar("B")
Access = Literal["client", "operator", "trusted", "anybody"]
"""A client's key; the operators' token; that too, unless the server has no keys; nothing."""
Html = NewType("Html", str)
"""What a route gives that answers with a page."""
_LOG = logging.getLogger("loraexport_serve.access")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RANDOM = random.Random()
"""Of ids, which are no secrets; the system's own would cost a call for each request."""
_ENCODER = msgspec.json.Encoder()


class Json(Response):
    """A value that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _ENCODER.encode(content)


@dataclass
class Call(Generic[B]):
    """One request whose key, phase and body were checked."""

    service: Service
    request: Request
    id: str
    caller: Caller = ANYBODY
    body: B = None  # type: ignore[assignment]
    target: Target | None = None
    start: float = field(default_factory=time.perf_counter)
    stack: ExitStack = field(default_factory=ExitStack)
    """Is left once the answer is sent, or nobody waits for it."""
    outcome: Outcome = field(default_factory=Outcome)

    async def resolve(
        self, kind: type[H], model: str | None, blend: Mapping[str, float] | None = None
    ) -> tuple[H, Target]:
        """Whom the request means (see Catalog.resolve); the host stays open until it is answered.

        Raises:
            ApiError: 404, 400.
        """
        service = self.service
        await service.find_adapters(self.caller, [model, *(blend or ())])
        target = service.catalog.resolve(kind, self.caller, model, blend)
        host = target.host
        assert isinstance(host, kind), "resolve has held it to this"
        self.stack.enter_context(host.use(target.names))
        self.target = target
        meter = service.meter
        meter.child(meter.by_adapter, host.name, meter.adapter(host.name, target.tag)).inc()
        return host, target

    def refuse(self, error: Exception) -> ApiError:
        """What is answered for an error; one that is the server's own fault is logged here."""
        refusal = of_error(error)
        if isinstance(error, ClosedError):  # nobody has closed what is still resolved
            self.note(error)
        if refusal is None:
            logging.getLogger(__name__).error("request %s failed", self.id, exc_info=error)
            self.note(error)
            refusal = ApiError(500, "The server failed; its log has the reason.", code="failed")
        self.outcome.error = refusal.code
        return refusal

    def note(self, error: BaseException | None) -> None:
        """Tell the artifact that was asked how it went."""
        if self.target is not None:
            self.target.host.note(error)


Answer = Callable[[Call[B]], Awaitable[Response]]
"""What a route does with a request."""


class Endpoint(Generic[B]):
    """Answers one method and path."""

    def __init__(
        self,
        service: Service,
        path: str,
        answer: Answer[B],
        body: type[B] | None,
        gives: Any,
        access: Access,
        needs_ready: bool,
    ) -> None:
        self.body, self.gives, self.access, self.answer = body, gives, access, answer
        self.path = path
        self._service, self._needs_ready = service, needs_ready
        self._seconds = service.meter.seconds.labels(path)
        self._decoder = None if body is None else msgspec.json.Decoder(body)
        """Decoders hold no state of a call."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        given = _header(request, b"x-request-id")
        own = given if _ID.fullmatch(given) else f"{_RANDOM.getrandbits(128):032x}"
        call: Call[B] = Call(self._service, request, own)
        status = 499
        meter = self._service.meter
        meter.in_flight += 1
        try:
            with call.stack:
                response = await self._respond(call)
                response.raw_headers.append((b"x-request-id", call.id.encode()))
                status = response.status_code
                await response(scope, receive, send)
        except ClientGoneError:
            status = 499
        finally:
            seconds = time.perf_counter() - call.start
            meter.in_flight -= 1
            meter.child(meter.requests, self.path, str(status)).inc()
            self._seconds.observe(seconds)
            self._log(call, status, seconds)
            if (traces := self._service.traces) is not None and self.access != "anybody":
                self._trace(traces, call, status, seconds)

    async def _respond(self, call: Call[B]) -> Response:
        """The answer, or what went wrong. Raises ClientGoneError."""
        try:
            self._admit(call)
            if self._decoder is not None:
                call.body = await self._read_body(call.request, self._decoder)
            response = await self._wait(call)
            call.note(None)
            return response
        except ClientGoneError:
            raise
        except Exception as error:
            refusal = call.refuse(error)
            return Json(refusal.body(), refusal.status, refusal.headers)

    async def _wait(self, call: Call[B]) -> Response:
        """The answer. What operators change is changed to its end, whoever waits for it."""
        if self.access in ("operator", "trusted"):
            return await self.answer(call)
        return await unless_gone(call.request, self.answer(call))

    def _admit(self, call: Call[B]) -> None:
        keys, given = self._service.keys, _header(call.request, b"authorization")
        match self.access:
            case "client":
                call.caller = keys.caller(given)
            case "operator":
                keys.require_admin(given)
            case "trusted":
                keys.may_watch(given)
        if self._needs_ready:
            self._service.require_phase()

    async def _read_body(self, request: Request, decoder: msgspec.json.Decoder[B]) -> B:
        settings = self._service.settings
        try:
            async with asyncio.timeout(settings.body_timeout or None):
                data = await _read(request, settings.max_body_bytes)
        except TimeoutError as error:
            message = f"the body did not come within {settings.body_timeout:g} seconds"
            raise _closing(ApiError(408, message, code="timeout")) from error
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            message, _, place = str(error).partition(" - at `$")
            param = place.rstrip("`").removeprefix(".") or None
            if message.startswith("Object contains unknown field"):
                param = message.split("`")[1]
                message = f"{param} is not supported here"
            raise ApiError(400, message, code="invalid_request", param=param) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            text = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ApiError(400, f"the body is no JSON: {text}", code="invalid_json") from error

    def _log(self, call: Call[B], status: int, seconds: float) -> None:
        level = logging.DEBUG if self.access == "anybody" else logging.INFO
        if not _LOG.isEnabledFor(level):
            return
        fields = {
            "request_id": call.id,
            "method": call.request.method,
            "path": self.path,
            "status": status,
            "ms": round(1000 * seconds, 2),
            "model": None if call.target is None else call.target.label,
            "caller": call.caller.name,
        }
        _LOG.log(level, "%(method)s %(path)s %(status)d %(ms).2f ms", fields, extra=fields)

    def _trace(self, traces: Traces, call: Call[B], status: int, seconds: float) -> None:
        told = {"loraexport.request_id": call.id, "loraexport.caller": call.caller.name}
        if (target := call.target) is not None:
            told["gen_ai.request.model"] = target.label
            told["loraexport.artifact"], told["loraexport.adapter"] = target.host.name, target.tag
        traces.note(call.request.scope, self.path, status, seconds, call.outcome, told)


def post(
    service: Service,
    path: str,
    body: type[B],
    gives: Any,
    answer: Answer[B],
    access: Access = "client",
) -> Route:
    """A route whose requests have a JSON body; it is answered once the server is ready.

    Args:
        gives: the type of its JSON, or str of plain text, or Html; None: none of these.
    """
    endpoint = Endpoint(service, path, answer, body, gives, access, True)
    return Route(path, endpoint, methods=["POST"])


def get(
    service: Service,
    path: str,
    gives: Any,
    answer: Answer[None],
    access: Access = "client",
    *,
    method: str = "GET",
    needs_ready: bool = True,
) -> Route:
    """A route without a body; `gives` as of `post`."""
    endpoint = Endpoint(service, path, answer, None, gives, access, needs_ready)
    return Route(path, endpoint, methods=[method])


def _header(request: Request, name: bytes) -> str:
    """Its first value, or ""; Starlette's own look-up takes several times as long."""
    for key, value in request.scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


async def _read(request: Request, most: int) -> bytes:
    """The body. Raises ApiError (413), ClientGoneError."""
    length = _header(request, b"content-length")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    parts, size = [], 0
    while True:
        message: Message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(most: int) -> ApiError:
    message = f"the body has more than {most} bytes, which this server takes at most"
    return _closing(ApiError(413, message, code="body_too_large"))


def _closing(error: ApiError) -> ApiError:
    """What is left of the body is not read, so the connection ends."""
    error.headers["connection"] = "close"
    return error
