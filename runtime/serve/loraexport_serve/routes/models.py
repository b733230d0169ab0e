"""GET /v1/models and /v1/models/{id}: every base and adapter that a key may use, vLLM's cards."""

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from ..errors import ApiError, unknown_model
from ..hosts.host import Host
from ..service import Service
from .endpoint import Call, Json, get


class Card(msgspec.Struct):
    """A base, or an adapter, whose `parent` is the base."""

    id: str
    created: int
    root: str
    """The artifact's own name, or the adapter's; no path."""
    parent: str | None
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "loraexport"
    permission: list[dict[str, str]] = []


class Cards(msgspec.Struct):
    data: list[Card]
    object: str = "list"


def routes(service: Service) -> list[Route]:
    """/v1/models."""
    return [
        get(service, "/v1/models", Cards, _list),
        get(service, "/v1/models/{model:path}", Card, _show),
    ]


async def _list(call: Call[None]) -> Response:
    """Every base and adapter that this key may use."""
    catalog, caller = call.service.catalog, call.caller
    listings = {host.name: host.listing() for host in catalog}
    cards = []
    for host in catalog:
        cards.append(_base(host))
        for name in sorted(listings[host.name]):
            if caller.may_use(host.name, name):
                others = sum(name in listing for listing in listings.values())
                is_plain = others == 1 and catalog.get(name) is None
                cards.append(_adapter(host, name, name if is_plain else f"{host.name}:{name}"))
    return Json(Cards(cards))


async def _show(call: Call[None]) -> Response:
    """The card of one."""
    name = call.request.path_params["model"]
    try:
        host, target = await call.resolve(Host, name)
    except ApiError as error:
        raise unknown_model(name) from error  # several have it: none is meant by this name alone
    adapter = target.adapter
    return Json(_adapter(host, adapter, name) if isinstance(adapter, str) else _base(host))


def _base(host: Host) -> Card:
    return Card(host.name, host.created, host.manifest.name, None, host.max_model_len)


def _adapter(host: Host, name: str, shown: str) -> Card:
    return Card(shown, host.created, name, host.name, host.max_model_len)
