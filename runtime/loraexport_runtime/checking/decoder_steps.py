"""A decoder's graph in a plain session -> the logits of prompts and the steps after them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..contract.files import resolve
from ..contract.genai_config import read_genai_config
from ..contract.kinds import ADAPTER_WEIGHTS, Decoder
from ..contract.manifest import Manifest
from ..device.dtypes import FLOAT_TYPES, NUMPY_DTYPES, ONNX_TYPES
from ..device.kernels import choose_kernels
from ..device.memory import host_value
from ..device.ort_session import open_session
from ..generation.rope import READ_LENGTHS, tokens_until_reread
from .model import Mix, slots_of, weights_of

_MOST_LOGITS = 2**30
"""Bytes of one run: above them texts are read in parts."""


def read_decoder_config(folder: Path, decoder: Decoder) -> dict[str, Any]:
    """What onnxruntime-genai is told of the model."""
    config: dict[str, Any] = read_genai_config(resolve(folder, decoder.folder))["model"]
    return config


def empty_cache(config: Mapping[str, Any], batch: int, dtype: str) -> np.ndarray:
    """A layer's keys, or values, of no tokens: [batch, heads, 0, size]."""
    decoder = config["decoder"]
    sizes = (batch, decoder["num_key_value_heads"], 0, decoder["head_size"])
    return np.zeros(sizes, NUMPY_DTYPES[dtype])


Logits = Callable[[list[list[int]], np.ndarray, Sequence[Mix]], np.ndarray]
"""(prompts, tokens to feed [batch, steps], what each row uses) -> logits [batch, steps,
vocabulary]."""


def open_runner(
    folder: Path,
    manifest: Manifest,
    decoder: Decoder,
    provider: tuple[str, dict[str, Any]],
    kernels: bool = False,
) -> Logits:
    """The graph with its own stacks, as the engines have it; they give tokens, not logits."""
    library = choose_kernels(kernels, manifest, [provider]).library
    session = open_session(resolve(folder, decoder.onnx), [provider], {}, None, library)
    config, slots = read_decoder_config(folder, decoder), manifest.num_slots
    return _Runner(session, manifest.dtype, decoder, config, slots).run


class _Runner:
    """A batch is padded on the right, then comes one token of each row at a time: a row's cache has
    no gap, its own length says where the next token's key and value go."""

    def __init__(
        self,
        session: ort.InferenceSession,
        dtype: str,
        decoder: Decoder,
        config: Mapping[str, Any],
        num_slots: int,
    ) -> None:
        self._session, self._dtype, self._decoder, self._config = session, dtype, decoder, config
        self._num_slots = num_slots
        self._names = {entry.name for entry in session.get_inputs()}
        self._past = sorted(name for name in self._names if name.startswith("past_key_values."))
        optional = {entry.name for entry in session.get_overridable_initializers()}
        self._takes_lengths = READ_LENGTHS in optional
        logits = next(entry for entry in session.get_outputs() if entry.name == "logits")
        self._vocabulary, self._logits_dtype = int(logits.shape[2]), FLOAT_TYPES[logits.type]

    def run(self, prompts: list[list[int]], tokens: np.ndarray, rows: Sequence[Mix]) -> np.ndarray:
        """See Logits."""
        steps: list[np.ndarray] = []
        total = tokens.shape[1]
        while len(steps) < total:
            texts = [
                [*prompt, *row[: len(steps)].tolist()]
                for prompt, row in zip(prompts, tokens, strict=True)
            ]
            lengths = np.array([len(text) for text in texts])
            bounds = [tokens_until_reread(len(text), self._decoder.reread_length) for text in texts]
            count = min([total - len(steps), *(bound for bound in bounds if bound is not None)])
            logits, cache = self._read(texts, rows)
            steps.append(logits)
            for index in range(1, count):
                ids = np.ascontiguousarray(tokens[:, len(steps) - 1 : len(steps)])
                logits, cache = self._step(ids, lengths + index, cache, rows)
                steps.append(logits[:, 0])
        return np.stack(steps, axis=1)

    def _read(
        self, texts: list[list[int]], rows: Sequence[Mix]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """What follows each text, [batch, vocabulary], and the batch's cache."""
        lengths = np.array([len(text) for text in texts])
        longest, itemsize = int(lengths.max()), np.dtype(NUMPY_DTYPES[self._logits_dtype]).itemsize
        places = _MOST_LOGITS // (self._vocabulary * itemsize)
        if len(texts) * longest <= places:
            ids = np.zeros((len(texts), longest), dtype=np.int64)
            for row, text in enumerate(texts):
                ids[row, : len(text)] = text
            logits, cache = self._step(ids, lengths, self._empty(len(texts)), rows)
            return logits[np.arange(len(texts)), lengths - 1], cache
        # The graph gives logits at every place: a long text is read in parts, row by row.
        read = [
            self._read_in_parts(text, [mix], max(places, 1))
            for text, mix in zip(texts, rows, strict=True)
        ]
        joined = [_join([cache[index] for _, cache in read]) for index in range(len(self._past))]
        return np.concatenate([logits for logits, _ in read]), joined

    def _read_in_parts(
        self, text: list[int], rows: Sequence[Mix], size: int
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        cache, logits = self._empty(1), np.empty(0)
        for start in range(0, len(text), size):
            ids = np.array([text[start : start + size]])
            length = np.array([start + ids.shape[1]])
            logits, cache = self._step(ids, length, cache, rows, len(text))
        return logits[:, -1], cache

    def _empty(self, batch: int) -> list[np.ndarray]:
        return [empty_cache(self._config, batch, self._dtype)] * len(self._past)

    def _step(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        cache: list[np.ndarray],
        rows: Sequence[Mix],
        read_length: int = 0,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [*ids.shape, vocabulary] in host memory, and the cache that the next step takes.

        Args:
            lengths: int64 [batch], of the texts with these tokens.
            read_length: of the whole text that these tokens are a part of.
        """
        batch, new = ids.shape
        total = cache[0].shape[2] + new
        feeds = {
            "input_ids": ids,
            "attention_mask": (np.arange(total) < lengths[:, None]).astype(np.int64),
            "adapter_ids": slots_of(rows),
        }
        if "position_ids" in self._names:
            first = np.maximum(lengths[:, None] - new, 0)
            feeds["position_ids"] = first + np.arange(new)
        if self._takes_lengths:
            feeds[READ_LENGTHS] = np.full(batch, read_length)
        # As OrtValues: numpy has no bfloat16 that onnxruntime takes.
        inputs = {name: host_value(array, "int64") for name, array in feeds.items()}
        weights = weights_of(rows, self._num_slots)
        if self._decoder.blend and weights.any():  # an input that need not be fed
            inputs[ADAPTER_WEIGHTS] = host_value(weights, "float32")
        past = zip(self._past, cache, strict=True)
        inputs |= {name: host_value(array, self._dtype) for name, array in past}
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        # Into numpy's own memory: onnxruntime converts no bfloat16 to numpy.
        shape = batch, new, self._vocabulary
        logits = _bind(binding, "logits", shape, self._logits_dtype)
        sizes = batch, cache[0].shape[1], total, cache[0].shape[3]
        names = [name.replace("past_key_values.", "present.") for name in self._past]
        present = [_bind(binding, name, sizes, self._dtype) for name in names]
        self._session.run_with_iobinding(binding)
        return logits, present


def _bind(binding: Any, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory on the host that an output goes to."""
    array = np.empty(shape, NUMPY_DTYPES[dtype])
    binding.bind_output(name, "cpu", 0, ONNX_TYPES[dtype], array.shape, array.ctypes.data)
    return array


def _join(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Caches of single rows side by side, filled up to the longest with zeros."""
    longest = max(row.shape[2] for row in rows)
    joined = np.zeros((len(rows), rows[0].shape[1], longest, rows[0].shape[3]), rows[0].dtype)
    for index, row in enumerate(rows):
        joined[index, :, : row.shape[2]] = row[0]
    return joined
