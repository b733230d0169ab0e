"""GET /openapi.json: the routes of this port, their bodies and answers, made of the code."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from ..service import Service
from ..version import __version__
from .endpoint import Call, Endpoint, Html, Json, get

_REF = "#/components/schemas/{name}"
_TEXTS = {str: "text/plain", Html: "text/html"}
_STATUSES = {
    "400": "It cannot be served as asked.",
    "401": "No key, or an unknown one.",
    "404": "There is no such model, adapter or path.",
    "408": "It waited too long.",
    "413": "The body, or the number of texts, is too large.",
    "429": "The queue is full.",
    "500": "The server failed.",
    "503": "The server is not ready, or drains.",
}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """What every route answers in place of what was asked for."""

    error: ErrorDetail


def route(service: Service, described: Iterable[Route]) -> Route:
    """The document of some routes."""
    document = make_document(described)

    async def answer(call: Call[None]) -> Response:
        """This document."""
        return Json(document)

    return get(service, "/openapi.json", dict[str, Any], answer, "anybody", needs_ready=False)


def make_document(described: Iterable[Route]) -> dict[str, Any]:
    """OpenAPI 3.1 of some routes."""
    endpoints = [(one, _endpoint(one)) for one in described]
    kinds: list[Any] = [Error]
    for _, endpoint in endpoints:
        kinds += [kind for kind in (endpoint.body, endpoint.gives) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    by_kind = {str(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for one, endpoint in endpoints:
        path = one.path.replace(":path}", "}")
        for method in sorted((one.methods or set()) - {"HEAD"}):
            operation = _operation(path, method, endpoint, by_kind)
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "loraexport-serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _endpoint(route: Route) -> Endpoint[Any]:
    endpoint: object = route.endpoint
    assert isinstance(endpoint, Endpoint), "every route is made by post or get"
    return endpoint


def _operation(
    path: str, method: str, endpoint: Endpoint[Any], by_kind: dict[str, Any]
) -> dict[str, Any]:
    error = {"application/json": {"schema": by_kind[str(Error)]}}
    media = _TEXTS.get(endpoint.gives, "application/json")
    gives = {media: {"schema": by_kind[str(endpoint.gives)]}}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": gives}}
    for status, text in _STATUSES.items():
        responses[status] = {"description": text, "content": error}
    if endpoint.access == "anybody":
        responses = {"200": responses["200"], "503": {"description": "No.", "content": gives}}
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub('[^a-z0-9]+', '_', path)}".rstrip("_"),
        "summary": inspect.getdoc(endpoint.answer) or "",
        "responses": responses,
        "security": [] if endpoint.access == "anybody" else [{"key": []}],
    }
    if endpoint.body is not None:
        content = {"application/json": {"schema": by_kind[str(endpoint.body)]}}
        operation["requestBody"] = {"required": True, "content": content}
    names = re.findall(r"{(\w+)}", path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return operation
