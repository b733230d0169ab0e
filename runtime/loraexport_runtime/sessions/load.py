"""load, load_layers, load_model: an artifact's folder -> a session of its kind."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contract.artifact import open_artifact
from ..contract.kinds import Decoder, Graph, Layers, Model
from ..contract.manifest import Manifest
from ..device import providers as devices
from ..device.kernels import Kernels
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
    kernels: Kernels = "auto",
    allow_unverified: bool = False,
    digest: str | None = None,
) -> LayersSession | ModelSession:
    """Open an artifact: a LayersSession for single layers, a ModelSession for a whole model.

    Where a program knows which of them it opens, `load_layers` and `load_model` say so by type.

    Args:
        path: the folder that `loraexport build` published.
        providers: `"cpu"` and `"cuda"`, or onnxruntime's names, in order of preference, each with
            options if need be: `[("cuda", {"device_id": 1})]`.
        threads: onnxruntime's intra-op threads per layer; default: its own choice.
        cuda_graphs: `warm_up` captures CUDA graphs, which later runs replay. Such a session makes
            one run at a time, whatever the number of threads.
        kernels: "auto" takes the kernels of loraexport-kernels on CUDA, where it is installed and
            the artifact, built with export.kernels, was proven with them there; True takes them,
            those of the CPU too, or is an error; False takes stock operators. `stats` says which.
        allow_unverified: open an artifact whose parity failed or is still deferred.
        digest: open no other artifact than that whose manifest.json has this sha256.

    Raises:
        ArtifactError: a file is missing or damaged, parity has not passed, or the manifest has
            another digest.
        InputError: `digest` is no sha256, `threads` no number of threads, or `kernels` none of
            the three.
        ProviderError: a provider cannot run here; onnxruntime alone would fall back silently. Or
            CUDA graphs or kernels were asked for where there are none.
    """
    folder, pairs = Path(path), devices.normalise_providers(providers)
    devices.check_cuda_graphs(pairs, cuda_graphs)
    devices.check_threads(threads)
    start = time.perf_counter()
    session = open_artifact(
        folder,
        allow_unverified,
        lambda manifest: make_session(folder, manifest, pairs, threads, cuda_graphs, kernels),
        digest,
    )
    _LOG.info(
        "opened %s (%s, %d slots) on %s in %.2f s",
        folder,
        session.manifest.kind.tag,
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
    kernels: Kernels = "auto",
    allow_unverified: bool = False,
    digest: str | None = None,
) -> LayersSession:
    """Open an artifact of single layers; arguments and errors as of `load`.

    Raises:
        ArtifactError: it is of another kind, too.
    """
    session = load(
        path,
        providers,
        threads=threads,
        cuda_graphs=cuda_graphs,
        kernels=kernels,
        allow_unverified=allow_unverified,
        digest=digest,
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
    kernels: Kernels = "auto",
    allow_unverified: bool = False,
    digest: str | None = None,
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
        kernels=kernels,
        allow_unverified=allow_unverified,
        digest=digest,
    )
    if not isinstance(session, ModelSession):
        raise _other_kind(session, "load_layers()")
    return session


def make_session(
    folder: Path,
    manifest: Manifest,
    providers: list[tuple[str, dict[str, Any]]],
    threads: int | None,
    cuda_graphs: bool = False,
    kernels: Kernels = "auto",
) -> LayersSession | ModelSession:
    """The session that fits an artifact's kind; checks no file (see `load`).

    `cuda_graphs` on another device than CUDA: the same buckets, run as they are.

    Raises:
        ArtifactError: it is a decoder, which has no such session.
    """
    match manifest.kind:
        case Layers():
            return LayersSession(folder, manifest, providers, threads, cuda_graphs, kernels)
        case (Model() as model) | Graph(model):
            sizes = threads, cuda_graphs, kernels
            return ModelSession(folder, manifest, model, providers, *sizes)
        case Decoder():
            raise ArtifactError(
                f"{folder}: its kind is 'decoder'; open it with loraexport_runtime.load_generator()"
            )


def _other_kind(session: LayersSession | ModelSession, loader: str) -> ArtifactError:
    session.close()
    return ArtifactError(
        f"{session.folder}: its kind is {session.manifest.kind.tag!r}; open it with {loader}, or"
        " with load(), which opens either"
    )
