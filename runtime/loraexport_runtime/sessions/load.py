"""load, load_layers, load_model: an artifact's folder -> a session of its kind."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contract.artifact import open_artifact
from ..contract.manifest import Manifest
from ..device import providers as devices
from ..errors import ArtifactError
from .layers import LayersSession
from .model import ModelSession

_LOG = logging.getLogger(__name__)


def load(
    path: str | Path,
    providers: Sequence[devices.Provider] = (devices.CPU,),
    *,
    threads: int | None = None,
    cuda_graphs: bool = False,
    allow_unverified: bool = False,
) -> LayersSession | ModelSession:
    """Open an artifact: a LayersSession for `kind: layers`, a ModelSession for a whole model.

    Where a program knows which of them it opens, `load_layers` and `load_model` say so by type.

    Args:
        path: the folder that `loraexport build` published.
        providers: `"cpu"` and `"cuda"`, or onnxruntime's names, in order of preference, each with
            options if need be: `[("cuda", {"device_id": 1})]`.
        threads: onnxruntime's intra-op threads per layer; default: its own choice.
        cuda_graphs: `warm_up` captures CUDA graphs, which later runs replay. Such a session makes
            one run at a time, whatever the number of threads.
        allow_unverified: open an artifact whose parity failed or is still deferred.

    Raises:
        ArtifactError: a file is missing or damaged, or parity has not passed.
        ProviderError: a provider cannot run here; onnxruntime alone would fall back silently. Or
            CUDA graphs were asked for where there are none.
    """
    folder, pairs = Path(path), devices.normalise_providers(providers)
    devices.check_cuda_graphs(pairs, cuda_graphs)
    start = time.perf_counter()
    session = open_artifact(
        folder,
        allow_unverified,
        lambda manifest: _open(folder, manifest, pairs, threads, cuda_graphs),
    )
    _LOG.info(
        "opened %s (%s, %d slots) on %s in %.2f s",
        folder,
        session.manifest.kind,
        session.manifest.num_slots,
        ", ".join(name for name, _ in pairs),
        time.perf_counter() - start,
    )
    return session


def load_layers(
    path: str | Path,
    providers: Sequence[devices.Provider] = (devices.CPU,),
    *,
    threads: int | None = None,
    cuda_graphs: bool = False,
    allow_unverified: bool = False,
) -> LayersSession:
    """Open an artifact of `kind: layers`; arguments and errors as of `load`.

    Raises:
        ArtifactError: it is of another kind, too.
    """
    session = load(
        path,
        providers,
        threads=threads,
        cuda_graphs=cuda_graphs,
        allow_unverified=allow_unverified,
    )
    if not isinstance(session, LayersSession):
        raise _other_kind(session, "load_model()")
    return session


def load_model(
    path: str | Path,
    providers: Sequence[devices.Provider] = (devices.CPU,),
    *,
    threads: int | None = None,
    cuda_graphs: bool = False,
    allow_unverified: bool = False,
) -> ModelSession:
    """Open an artifact of a whole model; arguments and errors as of `load`.

    Raises:
        ArtifactError: it is of another kind, too.
    """
    session = load(
        path,
        providers,
        threads=threads,
        cuda_graphs=cuda_graphs,
        allow_unverified=allow_unverified,
    )
    if not isinstance(session, ModelSession):
        raise _other_kind(session, "load_layers()")
    return session


def open_session(
    folder: Path,
    manifest: Manifest,
    providers: list[tuple[str, dict[str, Any]]],
    threads: int | None,
    cuda_graphs: bool = False,
) -> LayersSession | ModelSession:
    """The session that fits an artifact's kind; checks nothing (see `load`).

    `cuda_graphs` on another device than CUDA: the same buckets, run as they are.
    """
    if manifest.model is not None:
        return ModelSession(folder, manifest, manifest.model, providers, threads, cuda_graphs)
    return LayersSession(folder, manifest, providers, threads, cuda_graphs)


def _open(
    folder: Path,
    manifest: Manifest,
    providers: list[tuple[str, dict[str, Any]]],
    threads: int | None,
    cuda_graphs: bool,
) -> LayersSession | ModelSession:
    if manifest.generator is not None:
        raise ArtifactError(
            f"{folder}: its kind is {manifest.kind!r}; open it with"
            " loraexport_runtime.load_generator()"
        )
    return open_session(folder, manifest, providers, threads, cuda_graphs)


def _other_kind(session: LayersSession | ModelSession, loader: str) -> ArtifactError:
    session.close()
    return ArtifactError(
        f"{session.folder}: its kind is {session.manifest.kind!r}; open it with {loader}, or with"
        " load(), which opens either"
    )
