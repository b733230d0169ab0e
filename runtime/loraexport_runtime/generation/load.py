"""load_generator: an artifact that generates, opened on an engine."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from ..contract.artifact import open_artifact
from ..contract.kinds import Decoder
from ..contract.manifest import Manifest
from ..device import providers as devices
from ..errors import ArtifactError
from .generator import TextGenerator

_LOG = logging.getLogger(__name__)


def load_generator(
    path: str | Path,
    providers: Sequence[devices.Provider] = (devices.CPU,),
    *,
    cuda_graphs: bool = False,
    allow_unverified: bool = False,
    digest: str | None = None,
) -> TextGenerator:
    """Open an artifact of kind decoder.

    Args:
        path: the folder that `loraexport build` published.
        providers: as of `load`: `"cpu"`, or `"cuda"` with options if need be. onnxruntime-genai
            takes those of CUDA but `device_id` and `user_compute_stream`.
        cuda_graphs: capture each decode step as a CUDA graph, in an engine of our own, as
            onnxruntime-genai cannot capture a batch. The first batch of a size captures its step
            (rows are rounded up to a power of two, tokens to 256), later ones replay it; memory for
            the largest cache so far is kept. A `seed` draws other tokens than onnxruntime-genai's.
        allow_unverified: open an artifact whose parity failed or is still deferred.
        digest: open no other artifact than that whose manifest.json has this sha256.

    Raises:
        ArtifactError: it is no such artifact, a file is damaged, parity has not passed, or the
            manifest has another digest.
        InputError: `digest` is no sha256.
        ProviderError: onnxruntime-genai is not installed, or a provider or an option of it cannot
            be used here.
    """
    folder, pairs = Path(path), devices.normalise_providers(providers)
    devices.check_cuda_graphs(pairs, cuda_graphs)

    def make(manifest: Manifest) -> TextGenerator:
        match manifest.kind:
            case Decoder() as decoder:
                return TextGenerator(folder, manifest, decoder, pairs, cuda_graphs)
            case other:
                raise ArtifactError(f"{folder}: its kind is {other.tag!r}; open it with load()")

    start = time.perf_counter()
    generator = open_artifact(folder, allow_unverified, make, digest)
    _LOG.info(
        "opened %s (%s, %d slots) on %s in %.2f s",
        folder,
        generator.manifest.kind.tag,
        generator.manifest.num_slots,
        ", ".join(name for name, _ in pairs),
        time.perf_counter() - start,
    )
    return generator
