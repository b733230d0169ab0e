"""load_generator: an artifact that generates, opened on an engine."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from ..contract.artifact import open_artifact
from ..contract.kinds import Decoder
from ..contract.manifest import Manifest
from ..device import providers as devices
from ..device.kernels import Kernels
from ..errors import ArtifactError
from .engine import MOST_QUEUED, MOST_QUEUED_TOKENS
from .generator import TextGenerator

_LOG = logging.getLogger(__name__)


def load_generator(
    path: str | Path,
    providers: Sequence[devices.Provider] = (devices.CPU,),
    *,
    cuda_graphs: bool = False,
    kernels: Kernels = "auto",
    rows: int | None = None,
    length: int | None = None,
    most_queued: int = MOST_QUEUED,
    most_queued_tokens: int = MOST_QUEUED_TOKENS,
    allow_unverified: bool = False,
    digest: str | None = None,
) -> TextGenerator:
    """Open an artifact of kind decoder.

    Args:
        path: the folder that `loraexport build` published.
        providers: as of `load`: `"cpu"`, or `"cuda"` with options if need be.
        cuda_graphs: capture each decode step as a CUDA graph, when it is first needed or by
            `warm_up`; there is one for 1, 2, 4, … rows.
        kernels: as of `load`.
        rows: answers at the same time; default: 8 on a CPU and 32 on CUDA, or as many as half of
            the free memory holds.
        length: tokens of a prompt and its answer, together; default: the model's context, or less
            where four such rows were more than that. Memory for rows x length is taken at once.
        most_queued: answers that may wait for a row.
        most_queued_tokens: tokens of these, what they may add included.
        allow_unverified: open an artifact whose parity failed or is still deferred.
        digest: open no other artifact than that whose manifest.json has this sha256.

    Raises:
        ArtifactError: it is no such artifact, a file is damaged, parity has not passed, or the
            manifest has another digest.
        InputError: `digest` is no sha256, or a size is not one of this model.
        ProviderError: the tokenizer's library is not installed, or a provider or an option of it
            cannot be used here.
    """
    folder, pairs = Path(path), devices.normalise_providers(providers)
    devices.check_cuda_graphs(pairs, cuda_graphs)

    def make(manifest: Manifest) -> TextGenerator:
        match manifest.kind:
            case Decoder() as decoder:
                return TextGenerator(
                    folder,
                    manifest,
                    decoder,
                    pairs,
                    cuda_graphs,
                    kernels=kernels,
                    rows=rows,
                    length=length,
                    most_queued=most_queued,
                    most_queued_tokens=most_queued_tokens,
                )
            case kind:
                raise ArtifactError(f"{folder}: its kind is {kind.tag!r}; open it with load()")

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
