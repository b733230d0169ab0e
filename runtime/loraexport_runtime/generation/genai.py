"""onnxruntime-genai: a decoder's tokenizer, and an engine that keeps the cache and samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProviderError
from .engine import Sampling


class GenaiEngine:
    """A model in onnxruntime-genai. A call has a cache of its own."""

    def __init__(self, folder: Path, pad: int, provider: str) -> None:
        self._og = import_genai()
        self._model = _open(self._og, folder, provider)
        self._pad = pad

    def start(
        self, tokens: Sequence[list[int]], slots: np.ndarray, steps: int, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """Read the prompts; then the next token of every row at a time, int64 [batch].

        At most `steps` times, and until every row has ended.
        """
        longest = max(map(len, tokens))
        params = self._og.GeneratorParams(self._model)
        options = _search_options(sampling)
        params.set_search_options(batch_size=len(tokens), max_length=longest + steps, **options)
        generator = self._og.Generator(self._model, params)
        generator.set_model_input("adapter_ids", slots)
        # On the right: positions count from the first column.
        padded = np.full((len(tokens), longest), self._pad, dtype=np.int32)
        for index, own in enumerate(tokens):
            padded[index, : len(own)] = own
        generator.append_tokens(padded)
        return _run(generator, steps, slots)

    def warm_up(self, rows: int, length: int) -> None:
        """Nothing is prepared ahead."""


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a generator's folder; it reads no weights."""
    og = import_genai()
    try:
        return og.Tokenizer(str(folder))
    except Exception as error:
        raise ProviderError(
            f"{folder}: onnxruntime-genai {og.__version__} cannot open its tokenizer: {error}"
        ) from error


def import_genai() -> Any:
    """onnxruntime_genai, an extra.

    Raises:
        ProviderError: it is not installed.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise ProviderError(
            "generation needs onnxruntime-genai: pip install 'loraexport-runtime[genai]'"
        ) from error
    return onnxruntime_genai


def _run(generator: Any, steps: int, slots: np.ndarray) -> Iterator[np.ndarray]:
    """The generator reads the memory of `slots` at every step, and does not keep it alive."""
    for _ in range(steps):
        if generator.is_done():
            return
        generator.generate_next_token()
        yield np.array(generator.get_next_tokens(), dtype=np.int64)


def _search_options(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature <= 0:
        return {"do_sample": False}
    options = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    return options if sampling.seed is None else options | {"random_seed": sampling.seed}


def _open(og: Any, folder: Path, provider: str) -> Any:
    if provider == "cuda" and not og.is_cuda_available():
        raise ProviderError(
            "CUDA was asked for, but this onnxruntime-genai has none; install"
            " onnxruntime-genai-cuda, or pass provider='cpu'"
        )
    config = og.Config(str(folder))
    config.clear_providers()
    if provider == "cuda":
        config.append_provider("cuda")
    try:
        return og.Model(config)
    except Exception as error:
        raise ProviderError(
            f"{folder}: onnxruntime-genai {og.__version__} cannot open it on {provider}: {error}"
        ) from error
