"""onnxruntime-genai's own engine: another way to run a decoder's graph, which parity and benchmarks
compare with the runtime's."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.genai_config import end_tokens, read_genai_config
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.ort_session import require_device
from loraexport_runtime.device.providers import CPU, CUDA
from loraexport_runtime.errors import ProviderError, shorten
from loraexport_runtime.generation.rope import tokens_until_reread
from loraexport_runtime.slots.batch import RowAdapters

_REFUSED = ("device_id", "user_compute_stream")
"""Options of CUDA that onnxruntime-genai sets itself: it computes on one stream of its own, on the
current device of the process."""
_PAD = -1
"""onnxruntime-genai takes this token for padding wherever it stands, so it is none that a prompt
may hold; ONNX's Gather reads the last row for it, which nothing attends to."""
_MAX_SAID = 400
"""Letters of what it says."""
MOST_ROWS = 32
"""Of a batch that onnxruntime-genai takes."""


class GenaiEngine:
    """A model in onnxruntime-genai, with the adapters that its graph was built with."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        decoder: Decoder,
        providers: Sequence[tuple[str, dict[str, Any]]],
    ) -> None:
        """
        Raises:
            ProviderError: it is not installed, or cannot be opened on these.
        """
        where = self._folder = resolve(folder, decoder.folder)
        self._og = import_genai()
        self._model = open_model(self._og, where, providers)
        self._reread_length = decoder.reread_length
        self._slots = {entry.name: entry.slot or 0 for entry in manifest.adapters}
        self.ends = frozenset(end_tokens(read_genai_config(where)["model"]))

    def greedy(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapters], steps: int
    ) -> np.ndarray:
        """The likeliest tokens of every prompt, int64 [batch, steps]; -1 after a row's end."""
        slots = np.array([self._slots[name] if isinstance(name, str) else 0 for name in adapters])
        parts = [
            self._rereading(prompts[at : at + MOST_ROWS], slots[at : at + MOST_ROWS], steps)
            for at in range(0, len(prompts), MOST_ROWS)
        ]
        return np.concatenate(parts)

    def _rereading(
        self, prompts: Sequence[Sequence[int]], slots: np.ndarray, steps: int
    ) -> np.ndarray:
        """A batch is begun anew wherever a row of it has to be read again."""
        tokens = np.zeros((len(prompts), 0), np.int64)
        while tokens.shape[1] < steps:
            pairs = zip(prompts, tokens.tolist(), strict=True)
            texts = [[*prompt, *more] for prompt, more in pairs]
            bounds = [tokens_until_reread(len(text), self._reread_length) for text in texts]
            left = steps - tokens.shape[1]
            count = min([left, *(bound for bound in bounds if bound is not None)])
            tokens = np.concatenate([tokens, self._batch(texts, slots, count)], axis=1)
        for row in tokens:
            over = np.flatnonzero(np.isin(row, list(self.ends)))
            if len(over):
                row[over[0] + 1 :] = -1
        return tokens

    def _batch(self, prompts: Sequence[Sequence[int]], slots: np.ndarray, steps: int) -> np.ndarray:
        with self._running():
            longest = max(map(len, prompts))
            params = self._og.GeneratorParams(self._model)
            size = {"batch_size": len(prompts), "max_length": longest + steps}
            params.set_search_options(do_sample=False, **size)
            generator = self._og.Generator(self._model, params)
            generator.set_model_input("adapter_ids", slots)  # its memory is read at every step
            # On the right: positions count from the first column.
            padded = np.full((len(prompts), longest), _PAD, dtype=np.int32)
            for index, row in enumerate(prompts):
                padded[index, : len(row)] = row
            generator.append_tokens(padded)
            tokens = np.full((len(prompts), steps), _PAD, dtype=np.int64)
            for step in range(steps):
                if generator.is_done():
                    break
                generator.generate_next_token()
                tokens[:, step] = generator.get_next_tokens()
        return tokens

    @contextmanager
    def _running(self) -> Iterator[None]:
        """What it raises while it runs a graph, on whatever a folder holds, as a ProviderError."""
        try:
            yield
        except RuntimeError as error:
            raise ProviderError(
                f"{self._folder}: onnxruntime-genai {self._og.__version__} cannot run it:"
                f" {shorten(str(error), _MAX_SAID)}"
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
            "onnxruntime-genai is not installed: pip install 'loraexport[genai]'"
        ) from error
    return onnxruntime_genai


def open_model(og: Any, folder: Path, providers: Sequence[tuple[str, dict[str, Any]]]) -> Any:
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
        config.overlay(json.dumps({"model": {"pad_token_id": _PAD}}))
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
                    ", and choose the device by the environment variable CUDA_VISIBLE_DEVICES"
                    if key == "device_id"
                    else ""
                )
            )
    name, options = providers[0]
    if name == CPU:
        return None
    return {key: value for key, value in options.items() if key not in _REFUSED}
