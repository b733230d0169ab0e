"""A decoder's graph in a plain session -> the logits of prompts and the steps after them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..contract.files import resolve
from ..contract.genai_config import read_genai_config
from ..contract.kinds import Decoder
from ..contract.manifest import Manifest
from ..device.dtypes import FLOAT_TYPES, NUMPY_DTYPES, ONNX_TYPES
from ..device.memory import host_value
from ..device.ort_session import open_session


def read_model_config(folder: Path, decoder: Decoder) -> dict[str, Any]:
    """What onnxruntime-genai is told of the model."""
    config: dict[str, Any] = read_genai_config(resolve(folder, decoder.folder))["model"]
    return config


def empty_cache(config: Mapping[str, Any], batch: int, dtype: str) -> np.ndarray:
    """A layer's keys, or values, of no tokens: [batch, heads, 0, size]."""
    decoder = config["decoder"]
    sizes = (batch, decoder["num_key_value_heads"], 0, decoder["head_size"])
    return np.zeros(sizes, NUMPY_DTYPES[dtype])


Logits = Callable[[list[list[int]], np.ndarray, np.ndarray], np.ndarray]
"""(prompts, tokens to feed [batch, steps], adapter_ids) -> logits [batch, steps, vocabulary]."""


def open_runner(
    folder: Path, manifest: Manifest, decoder: Decoder, provider: tuple[str, dict[str, Any]]
) -> Logits:
    """The graph with its own stacks, as the engines have it; they give tokens, not logits.

    A batch is padded on the right, then comes one token of each row at a time: a row's cache has
    no gap, its own length says where the next token's key and value go.
    """
    session = open_session(resolve(folder, decoder.onnx), [provider], {}, None)
    names = [entry.name for entry in session.get_inputs()]
    past = [name for name in names if name.startswith("past_key_values.")]
    config = read_model_config(folder, decoder)

    def run(prompts: list[list[int]], tokens: np.ndarray, adapter_ids: np.ndarray) -> np.ndarray:
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.full((len(prompts), lengths.max()), decoder.pad_token_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        empty = empty_cache(config, len(prompts), manifest.dtype)
        cache = {name: host_value(empty, manifest.dtype) for name in past}
        total, steps = ids.shape[1], []
        for step in range(tokens.shape[1]):
            mask = (np.arange(total + step) < (lengths + step)[:, None]).astype(np.int64)
            feeds = {"input_ids": ids, "attention_mask": mask, "adapter_ids": adapter_ids}
            if "position_ids" in names:
                first = 0 if step == 0 else lengths[:, None] + step - 1
                feeds["position_ids"] = first + np.arange(ids.shape[1]) + np.zeros_like(ids)
            # As OrtValues: numpy has no bfloat16 that onnxruntime takes.
            fed = {name: host_value(array, "int64") for name, array in feeds.items()}
            logits, cache = _run_step(session, {**fed, **cache}, past, ids.shape)
            last = lengths - 1 if step == 0 else np.zeros_like(lengths)
            steps.append(logits[np.arange(len(prompts)), last])
            ids = np.ascontiguousarray(tokens[:, step : step + 1])
        return np.stack(steps, axis=1)

    return run


def _run_step(
    session: ort.InferenceSession,
    inputs: Mapping[str, ort.OrtValue],
    past: Sequence[str],
    shape: tuple[int, ...],
) -> tuple[np.ndarray, dict[str, ort.OrtValue]]:
    """Logits [*shape, vocabulary] in host memory, and the cache that the next step takes."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    entry = next(entry for entry in session.get_outputs() if entry.name == "logits")
    # Into numpy's own memory: onnxruntime converts no bfloat16 to numpy.
    dtype = FLOAT_TYPES[entry.type]
    logits = np.empty((*shape, entry.shape[2]), NUMPY_DTYPES[dtype])
    place = ONNX_TYPES[dtype], logits.shape, logits.ctypes.data
    binding.bind_output("logits", "cpu", 0, *place)
    for name in past:
        binding.bind_output(name.replace("past_key_values.", "present."), "cpu")
    session.run_with_iobinding(binding)
    return logits, dict(zip(past, binding.get_outputs()[1:], strict=True))
