"""The operators' port: adapters by /v1/loras, with Dynamo's fields and more, and /v1/artifacts."""

import hashlib
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from loraexport_runtime import AdapterInfo, LoraexportError

from ..errors import invalid
from ..hosts.host import Host
from ..hosts.places import find_below
from ..hosts.updates import bad_input, not_found
from ..service import Service
from .adapters import unload_adapter
from .common import Body, ModelName
from .endpoint import Call, Json, get, post


class Source(Body, kw_only=True):
    uri: str
    """file:///… of a folder below one that is allowed."""


class LoraBody(Body, kw_only=True):
    """An adapter's name, and where it is."""

    lora_name: str
    source: Source
    model: ModelName | None = None
    load_inplace: bool = True
    pinned: bool | None = None


class Lora(msgspec.Struct):
    """An adapter that serves."""

    name: str
    lora_id: int
    """Of its name, as Dynamo has one."""
    model: str
    state: Literal["loaded"]
    tier: Literal["slot", "host"]
    slot: int | None
    generation: int
    digest: str
    rank: int
    scale: float
    pinned: bool
    leases: int
    requests: int
    """That name it now."""


class Loras(msgspec.Struct):
    loras: list[Lora]
    count: int
    status: str = "success"


class Done(msgspec.Struct):
    message: str
    lora_name: str
    lora_id: int
    status: str = "success"


class ArtifactBody(Body, kw_only=True):
    """Which artifact is exchanged, and for what."""

    name: ModelName
    path: str
    """A folder below one that is allowed."""
    digest: str | None = None
    """sha256 that its manifest.json has to have."""


class Artifact(msgspec.Struct):
    """An artifact that serves."""

    name: str
    artifact: str
    """As its spec names it."""
    kind: str
    built: str
    opened: int
    adapters: int


class Artifacts(msgspec.Struct):
    artifacts: list[Artifact]


def routes(service: Service) -> list[Route]:
    """For operators, always."""
    return [
        get(service, "/v1/loras", Loras, _list, "operator"),
        post(service, "/v1/loras", LoraBody, Done, _load, "operator"),
        get(service, "/v1/loras/{name}", Done, _unload, "operator", method="DELETE"),
        get(service, "/v1/artifacts", Artifacts, _list_artifacts, "operator"),
        post(service, "/v1/artifacts", ArtifactBody, Artifact, _exchange, "operator"),
    ]


async def _list(call: Call[None]) -> Response:
    """Every adapter, and where it is."""
    loras = [
        _describe(host, name, info)
        for host in call.service.catalog
        for name, info in sorted(host.listing().items())
    ]
    return Json(Loras(loras, len(loras)))


async def _load(call: Call[LoraBody]) -> Response:
    """Load an adapter, or replace one; nothing happens where its content is there."""
    body, service = call.body, call.service
    host = service.catalog.named(body.model)
    path = service.updates.find_folder(_read_uri(body.source.uri))
    with host.use():
        info = await service.updates.load(
            host, body.lora_name, path, in_place=body.load_inplace, pinned=body.pinned
        )
    message = f"LoRA adapter '{body.lora_name}' serves {len(info.ranks)} sites"
    return Json(Done(message, body.lora_name, _lora_id(body.lora_name)))


async def _unload(call: Call[None]) -> Response:
    """Forget an adapter, `artifact:adapter` where several artifacts have it."""
    given = call.request.path_params["name"]
    model, has_model, name = given.rpartition(":")
    where = model if has_model else None
    advice = "name artifact:adapter"
    await unload_adapter(call.service, name, where, shown=given, advice=advice)
    return Json(Done(f"LoRA adapter '{name}' is unloaded", name, _lora_id(name)))


async def _list_artifacts(call: Call[None]) -> Response:
    """Every artifact that serves."""
    return Json(Artifacts([_artifact(host) for host in call.service.catalog]))


async def _exchange(call: Call[ArtifactBody]) -> Response:
    """Let another version of an artifact serve from the next request on; back goes the same way."""
    body, service = call.body, call.service
    host = service.catalog.named(body.name)
    path = find_below(body.path, service.settings.artifact_roots)
    if path is None:
        raise not_found("There is no artifact at path, below the folders that are allowed.")
    settings = msgspec.structs.replace(host.settings, path=str(path), digest=body.digest)
    async with service.exchanging:
        try:
            host = await service.start(body.name, settings)
        except LoraexportError as error:
            message = str(error).replace(str(path), "the artifact")
            raise invalid(message, "path") from error
    return Json(_artifact(host))


def _artifact(host: Host) -> Artifact:
    said = host.manifest
    kind, count = said.kind.tag, len(host.listing())
    return Artifact(host.name, said.name, kind, said.created, host.created, count)


def _describe(host: Host, name: str, info: AdapterInfo) -> Lora:
    return Lora(
        name=name,
        lora_id=_lora_id(name),
        model=host.name,
        state="loaded",
        tier="host" if info.slot is None else "slot",
        slot=info.slot,
        generation=info.generation,
        digest=info.digest,
        rank=max(info.ranks.values(), default=0),
        scale=info.scale,
        pinned=info.pinned,
        leases=info.leases,
        requests=host.in_flight[name],
    )


def _read_uri(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise bad_input("source.uri: expected file:///FOLDER", "source")
    return unquote(parts.path)


def _lora_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
