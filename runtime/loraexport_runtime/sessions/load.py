"""load: an artifact's folder -> a session of its kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contract.artifact import open_artifact
from ..contract.kinds import Decoder, Graph, Layers, Model
from ..contract.manifest import Manifest
from ..device import providers as devices
from ..errors import ArtifactError
from .layers import Session
from .model import ModelSession


def load(
    path: str | Path,
    providers: Sequence[devices.Provider] = (devices.CPU,),
    *,
    threads: int | None = None,
    cuda_graphs: bool = False,
    allow_unverified: bool = False,
) -> "Session | ModelSession":
    """Open an artifact: a Session for single layers, a ModelSession for a whole model.

    Args:
        path: the folder that `loraexport build` published.
        providers: onnxruntime's names, or `"cpu"` and `"cuda"`, in order of preference, each with
            options if need be: `[("CUDAExecutionProvider", {"device_id": 1})]`.
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
    return open_artifact(
        folder,
        allow_unverified,
        lambda manifest: open_session(folder, manifest, pairs, threads, cuda_graphs),
    )


def open_session(
    folder: Path,
    manifest: Manifest,
    providers: list[tuple[str, dict[str, Any]]],
    threads: int | None,
    cuda_graphs: bool = False,
) -> "Session | ModelSession":
    """The session that fits an artifact's kind; checks no file (see `load`).

    `cuda_graphs` on another device than CUDA: the same buckets, run as they are.

    Raises:
        ArtifactError: it is a decoder, which has no such session.
    """
    match manifest.kind:
        case Layers():
            return Session(folder, manifest, providers, threads, cuda_graphs)
        case (Model() as model) | Graph(model):
            return ModelSession(folder, manifest, model, providers, threads, cuda_graphs)
        case Decoder():
            raise ArtifactError(
                f"{folder}: its kind is 'decoder'; open it with"
                " loraexport_runtime.generation.load.load_generator()"
            )
