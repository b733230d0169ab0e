"""Settings of an artifact -> its host, warmed up; all of it beside the loop, in a thread."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraexport_runtime import ModelSession, load, load_generator
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import ArtifactError

from ..config.schema import ModelSettings, Settings
from .decoder import DecoderHost
from .encoder import EncoderHost, threads_of
from .host import Host

_LOG = logging.getLogger(__name__)
_WARM_UP = ((1, 8), (8, 32))
"""Rows and tokens that an encoder runs ahead of traffic where its settings say nothing."""
_KERNELS: dict[str, Literal["auto"] | bool] = {"auto": "auto", "required": True, "never": False}
"""A setting -> what `load` takes."""


@dataclass(frozen=True)
class _Options:
    providers: list[str]
    cuda_graphs: bool
    kernels: Literal["auto"] | bool
    allow_unverified: bool
    digest: str | None


async def open_host(name: str, model: ModelSettings, server: Settings) -> Host:
    """The host of an artifact, ready for requests.

    Raises:
        LoraexportError: it cannot be opened, or not served.
    """
    device = model.device or server.device
    kernels = _KERNELS[model.kernels or server.kernels]
    options = _Options([device], model.cuda_graphs, kernels, model.allow_unverified, model.digest)
    manifest = await asyncio.to_thread(Manifest.read, Path(model.path), model.digest)
    host = await asyncio.to_thread(_open, name, manifest, model, server, options)
    try:
        await asyncio.to_thread(_warm_up, host)
    except BaseException:
        await asyncio.to_thread(host.close)
        raise
    return host


async def pin(host: Host) -> None:
    """Bring the adapters into slots that its settings pin.

    Raises:
        LoraexportError: one is not there, or they are more than the slots.
    """
    for adapter in host.settings.pinned:
        await asyncio.to_thread(host.adapters.pin, adapter)


def _open(
    name: str, manifest: Manifest, model: ModelSettings, server: Settings, options: _Options
) -> Host:
    if isinstance(manifest.kind, Decoder):
        generator = load_generator(
            model.path,
            options.providers,
            cuda_graphs=options.cuda_graphs,
            kernels=options.kernels,
            rows=model.rows,
            length=model.length,
            most_queued=server.max_queued,
            most_queued_tokens=server.max_queued_tokens,
            allow_unverified=options.allow_unverified,
            digest=options.digest,
        )
        return DecoderHost(name, generator, model)
    session = load(
        model.path,
        options.providers,
        threads=threads_of(model, server),
        cuda_graphs=options.cuda_graphs,
        kernels=options.kernels,
        allow_unverified=options.allow_unverified,
        digest=options.digest,
    )
    if not isinstance(session, ModelSession):
        session.close()
        raise ArtifactError(
            f"{model.path}: it holds single layers, which take hidden states and have no route;"
            " call them with loraexport_runtime.Batcher"
        )
    try:
        return EncoderHost(name, session, model, server)
    except BaseException:
        session.close()
        raise


def _warm_up(host: Host) -> None:
    match host:
        case DecoderHost():
            host.generator.warm_up()
        case EncoderHost():
            limit = host.max_model_len
            sizes = host.settings.warm_up or tuple(
                (rows, tokens if limit is None else min(tokens, limit)) for rows, tokens in _WARM_UP
            )
            if not host.manifest.runs_base and not host.listing():
                return  # no row can be run yet
            host.session.warm_up(sizes)
    _LOG.info("warmed up %s", host.name)
