"""load_generator: an artifact that generates, opened on an engine."""

from pathlib import Path

from ..contract.artifact import open_artifact
from ..contract.kinds import Decoder
from ..contract.manifest import Manifest
from ..errors import ArtifactError, ProviderError
from .generator import TextGenerator


def load_generator(
    path: str | Path,
    provider: str = "cpu",
    *,
    cuda_graphs: bool = False,
    allow_unverified: bool = False,
    digest: str | None = None,
) -> "TextGenerator":
    """Open an artifact of kind decoder.

    Args:
        path: the folder that `loraexport build` published.
        provider: `"cpu"` or `"cuda"`.
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
        ProviderError: onnxruntime-genai is not installed, or the provider cannot run here.
    """
    folder = Path(path)
    if provider not in ("cpu", "cuda"):
        raise ProviderError(f"provider: expected 'cpu' or 'cuda', got {provider!r}")
    if cuda_graphs and provider != "cuda":
        raise ProviderError(
            f"CUDA graphs were asked for on {provider!r}; pass provider='cuda', or no cuda_graphs"
        )

    def make(manifest: Manifest) -> TextGenerator:
        match manifest.kind:
            case Decoder() as decoder:
                return TextGenerator(folder, manifest, decoder, provider, cuda_graphs)
            case other:
                raise ArtifactError(f"{folder}: its kind is {other.tag!r}; open it with load()")

    return open_artifact(folder, allow_unverified, make, digest)
