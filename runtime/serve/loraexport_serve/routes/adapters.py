"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: vLLM's fields, texts and codes.

There only with `allow_adapter_updates`, and for operators where the server has keys.
"""

from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..hosts.updates import bad_input, not_found
from ..service import Service
from .common import Body, ModelName
from .endpoint import Call, post


class LoadBody(Body, kw_only=True):
    """An adapter's name, and its folder below one that is allowed."""

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool = False
    """Replace one of this name; requests in flight end with the old one."""
    pinned: bool | None = None
    """It keeps its slot."""
    model: ModelName | None = None
    """The artifact, where there are several."""


class UnloadBody(Body, kw_only=True):
    """An adapter's name."""

    lora_name: str | None = None
    model: ModelName | None = None


def routes(service: Service) -> list[Route]:
    """Both, or neither."""
    if not service.settings.allow_adapter_updates:
        return []
    return [
        post(service, "/v1/load_lora_adapter", LoadBody, str, _load, "trusted"),
        post(service, "/v1/unload_lora_adapter", UnloadBody, str, _unload, "trusted"),
    ]


async def _load(call: Call[LoadBody]) -> Response:
    """Load an adapter while others are served."""
    body, updates = call.body, call.service.updates
    if not body.lora_name or not body.lora_path:
        raise bad_input("Both 'lora_name' and 'lora_path' must be provided.")
    host = call.service.catalog.named(body.model)
    path = updates.find_folder(body.lora_path)
    with host.use():
        await updates.load(
            host, body.lora_name, path, in_place=body.load_inplace, pinned=body.pinned
        )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def _unload(call: Call[UnloadBody]) -> Response:
    """Forget an adapter."""
    body = call.body
    if not body.lora_name:
        raise bad_input("'lora_name' needs to be provided to unload a LoRA adapter.")
    name = body.lora_name
    await unload_adapter(call.service, name, body.model, shown=name, advice="name one as model")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def unload_adapter(
    service: Service, name: str, model: str | None, *, shown: str, advice: str
) -> None:
    """Have the artifact forget an adapter, or the one that has it.

    Args:
        model: the artifact; None: whichever.
        shown: what the client called the adapter.
        advice: what to do where several artifacts have it.

    Raises:
        ApiError: 404 or 400: none has it, or several.
    """
    hosts = list(service.catalog) if model is None else [service.catalog.named(model)]
    having = [host for host in hosts if host.has(name)]
    if not having:
        raise not_found(f"The lora adapter '{shown}' cannot be found.")
    if len(having) > 1:
        raise bad_input(f"Several artifacts have an adapter '{name}'; {advice}.")
    with having[0].use():
        await service.updates.unload(having[0], name)
