"""onnxruntime-genai: a decoder's tokenizer, and an engine that keeps the cache and samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..device.ort_session import require_device
from ..device.providers import CPU, CUDA
from ..errors import ProviderError
from .engine import Sampling

_REFUSED = ("device_id", "user_compute_stream")
"""Options of CUDA that onnxruntime-genai sets itself: it computes on one stream of its own, on the
current device of the process."""


class GenaiEngine:
    """A model in onnxruntime-genai. A call has a cache of its own."""

    def __init__(
        self, folder: Path, pad: int, providers: Sequence[tuple[str, dict[str, Any]]]
    ) -> None:
        self._og = import_genai()
        self._model = _open(self._og, folder, providers)
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
        for index, row in enumerate(tokens):
            padded[index, : len(row)] = row
        generator.append_tokens(padded)
        return _run(generator, steps, slots)

    def warm_up(self, rows: int, length: int) -> None:
        """Nothing is prepared ahead."""

    def close(self) -> None:
        """Give the model up."""
        self._model = None


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


def _open(og: Any, folder: Path, providers: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    options = _cuda_options(providers)
    if options is not None:
        if not og.is_cuda_available():
            raise ProviderError(
                "CUDA was asked for, but this onnxruntime-genai has none; install"
                " onnxruntime-genai-cuda, or pass providers=['cpu']"
            )
        require_device(("cuda", 0))
    try:
        config = og.Config(str(folder))
        config.clear_providers()
        if options is not None:
            config.append_provider("cuda")
            for key, value in options.items():
                config.set_provider_option("cuda", key, str(value))
        return og.Model(config)
    except Exception as error:
        raise ProviderError(
            f"{folder}: onnxruntime-genai {og.__version__} cannot open it on"
            f" {', '.join(name for name, _ in providers)}: {error}"
        ) from error


def _cuda_options(providers: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """What onnxruntime-genai is to tell CUDA; None: it runs on the CPU.

    Raises:
        ProviderError: a provider or an option that cannot be passed on.
    """
    for index, (name, options) in enumerate(providers):
        if name not in (CPU, CUDA) or (name == CUDA and index > 0):
            raise ProviderError(
                f"onnxruntime-genai cannot be opened on {', '.join(name for name, _ in providers)};"
                " pass providers=['cpu'] or ['cuda']"
            )
        refused = sorted(options) if name == CPU else [key for key in _REFUSED if key in options]
        if name == CUDA and str(options.get("device_id", 0)) == "0":
            refused = [key for key in refused if key != "device_id"]
        if refused:
            key, value = refused[0], options[refused[0]]
            raise ProviderError(
                f"onnxruntime-genai cannot take {key} = {value!r} of {name}; leave it out"
                + (
                    ", and choose the device by the environment variable CUDA_VISIBLE_DEVICES, or"
                    " pass cuda_graphs=True, whose engine takes it"
                    if key == "device_id"
                    else ""
                )
            )
    name, options = providers[0]
    if name == CPU:
        return None
    return {key: value for key, value in options.items() if key not in _REFUSED}
