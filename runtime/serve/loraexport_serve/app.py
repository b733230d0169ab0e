"""All routes as one ASGI application."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .auth import Keys
from .config.schema import Settings
from .errors import ApiError
from .routes import (
    adapters,
    classify,
    embeddings,
    loras,
    models,
    openapi,
    probes,
    rerank,
    tokens,
    watching,
)
from .routes.endpoint import Endpoint, Json
from .routes.generation import chat, completions
from .service import Service

FAMILIES: tuple[ModuleType, ...] = (
    probes,
    embeddings,
    rerank,
    classify,
    chat,
    completions,
    tokens,
    models,
    adapters,
    watching,
)
"""Modules of routes on the port of clients."""
ADMIN_FAMILIES: tuple[ModuleType, ...] = (probes, loras, watching)
"""The same on that of operators."""


def make_app(service: Service) -> Starlette:
    """What clients reach."""
    return _make(service, FAMILIES)


def make_admin_app(service: Service) -> Starlette:
    """What operators reach."""
    return _make(service, ADMIN_FAMILIES)


def describe(of_operators: bool) -> dict[str, Any]:
    """The OpenAPI document of a port, with every route that settings can switch on."""
    settings = Settings(models={"name": "path"}, allow_adapter_updates=True)
    service = Service(settings, Keys())
    families = ADMIN_FAMILIES if of_operators else FAMILIES
    return openapi.make_document([one for family in families for one in family.routes(service)])


def _make(service: Service, families: Sequence[ModuleType]) -> Starlette:
    routes = [route for family in families for route in family.routes(service)]
    routes.append(openapi.route(service, routes))
    return _App(routes)


class _App(Starlette):
    """Takes requests for a path without parameters straight to their endpoint.

    An endpoint answers for its own errors: what Starlette has around it would cost as much again.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        super().__init__(routes=routes, exception_handlers={HTTPException: _refuse})
        self._exact = {
            (method, route.path): route.app
            for route in routes
            if "{" not in route.path and isinstance(route.endpoint, Endpoint)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = None
        if scope["type"] == "http":
            app = self._exact.get((scope["method"], scope["path"]))
        await (app or super().__call__)(scope, receive, send)


async def _refuse(request: Request, error: Exception) -> Response:
    """A path or a method that is not there, in OpenAI's form."""
    assert isinstance(error, HTTPException), "what it is registered for"
    message = f"{request.method} {request.url.path[:200]} is not served here"
    refusal = ApiError(error.status_code, message, headers=error.headers)
    return Json(refusal.body(), refusal.status, refusal.headers)
