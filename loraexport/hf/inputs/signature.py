"""A model on the meta device -> what its graph takes and gives. No weight is read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loraexport_runtime.contract.kinds import TensorEntry, sequence_of

from ...errors import BaseModelError
from ..model import OUTPUTS, take_output
from ..quiet import quiet_models
from .forward import find_inputs
from .processor import image_size, num_frames

_LENGTHS = (8, 21)
"""Steps of a sequence that outputs are seen for."""
_MOST_SAMPLES = 2**17
"""Of three steps: three seconds at 44 kHz."""


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, beside adapter_ids."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


def read_signature(model: Any, config: Any, task: str, dtype: str, directory: Path) -> Signature:
    """The signature of a model on the meta device.

    Raises:
        BaseModelError: its forward takes what no graph can, or does not run on what it takes.
    """
    label = f"a model of type {config.model_type!r}"
    names = find_inputs(model, config)
    if task == "sentence-embedding" and names[:1] != ("input_ids",):
        kind = "images" if names[:1] == ("pixel_values",) else "sounds"
        raise BaseModelError(f"{label} takes {kind}; task {task!r} is of texts")
    shapes = _shapes(names, config, directory, label)
    inputs = tuple(
        TensorEntry(name, _dtype(name, dtype), ("batch", *shape))  # type: ignore[arg-type]
        for name, shape in shapes.items()
    )
    name = OUTPUTS[task]
    if task == "sentence-embedding":
        shape: tuple[str, ...] = (str(config.hidden_size),)
    elif is_plain_text(inputs) and task != "text-embedding":
        shape = _text_shape(model, config, task)
    else:
        shape = _seen_shape(model, inputs, task, label)
    return Signature(inputs, (TensorEntry(name, dtype, ("batch", *shape)),))  # type: ignore[arg-type]


@contextmanager
def without_values() -> Iterator[None]:
    """Let a model on the meta device run, and the code in it that looks at values go on."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device("meta"), torch.no_grad(), quiet_models():
        yield


def meta_inputs(inputs: Sequence[TensorEntry], sequence: int, batch: int) -> dict[str, Tensor]:
    """Tensors without values; call it where `without_values` holds. Masks are not needed."""
    return {
        entry.name: torch.empty(
            entry.sizes(batch, sequence),
            dtype=torch.int64 if entry.dtype == "int64" else torch.float32,
        )
        for entry in inputs
        if entry.name not in ("attention_mask", "token_type_ids")
    }


def is_plain_text(inputs: Sequence[TensorEntry]) -> bool:
    """Whether ids and what goes with each of them is all that a model takes."""
    return all(entry.dtype == "int64" and len(entry.shape) == 2 for entry in inputs)


def _dtype(name: str, dtype: str) -> str:
    return dtype if name in ("pixel_values", "input_values", "input_features") else "int64"


def _shapes(
    names: Sequence[str], config: Any, directory: Path, label: str
) -> dict[str, tuple[str, ...]]:
    """Each input's shape behind the rows."""
    shapes: dict[str, tuple[str, ...]] = dict.fromkeys(names, ("sequence",))
    if "bbox" in shapes:
        shapes["bbox"] = ("sequence", "4")
    if "pixel_values" in shapes:
        shapes["pixel_values"] = _pixel_shape(config, directory, label)
    if "input_features" in shapes:
        if config.model_type == "whisper":
            sizes: tuple[int, ...] = (config.num_mel_bins, 2 * config.max_source_positions)
        elif config.model_type == "clap_audio_model":
            sizes = (1, num_frames(directory), config.num_mel_bins)
        else:
            raise BaseModelError(
                f"{label} takes input_features of a shape that is not known here; it cannot be"
                " built"
            )
        shapes["input_features"] = tuple(map(str, sizes))
    return shapes


def _pixel_shape(config: Any, directory: Path, label: str) -> tuple[str, ...]:
    """[channels, height, width] as the processor makes images, else as the config says."""
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", None)
    size = image_size(directory) or getattr(vision, "image_size", None)
    if size is None and config.model_type == "layoutlmv3":
        size = config.input_size
    if size is None or channels is None:
        raise BaseModelError(
            f"{label} takes images, but its config has no image_size and num_channels; the graph's"
            " input needs a fixed size"
        )
    return tuple(map(str, (channels, *((size, size) if isinstance(size, int) else size))))


def _text_shape(model: Any, config: Any, task: str) -> tuple[str, ...]:
    """The output's, of a model of texts that is not run for it."""
    if not hasattr(config, "hidden_size"):
        raise BaseModelError(
            f"a model of type {config.model_type!r} has no hidden_size, as one that is made of"
            f" several; take the directory of the one that task {task!r} is about"
        )
    if task == "feature-extraction":
        return "sequence", str(config.hidden_size)
    if task == "causal-lm":
        return "sequence", str(model.get_output_embeddings().weight.shape[0])
    labels = str(getattr(config, "num_labels", 0))
    return (labels,) if task == "sequence-classification" else ("sequence", labels)


def _seen_shape(
    model: Any, inputs: Sequence[TensorEntry], task: str, label: str
) -> tuple[str, ...]:
    """The output's, from runs of two lengths; one that grows as nothing known is refused."""
    steps = "sequence"
    if inputs[0].name == "input_values":
        steps = _steps(model, label)
    lengths = [sequence_of([TensorEntry("", "int64", (steps,))], count) for count in _LENGTHS]
    shapes = [_run_shape(model, inputs, task, length, label) for length in lengths]
    dimensions = []
    for sizes in zip(*shapes, strict=True):
        gaps = {size - length for size, length in zip(sizes, lengths, strict=True)}
        if len(set(sizes)) == 1:
            dimensions.append(str(sizes[0]))
        elif len(gaps) == 1 and (gap := gaps.pop()) >= 0:
            dimensions.append(f"sequence+{gap}" if gap else "sequence")
        elif sizes == _LENGTHS:
            dimensions.append(steps)
        else:
            raise BaseModelError(
                f"{label} gives {sizes} of something for sequences of {lengths}, which no graph"
                " here can say; it cannot be built"
            )
    return tuple(dimensions)


def _run_shape(
    model: Any, inputs: Sequence[TensorEntry], task: str, sequence: int, label: str
) -> tuple[int, ...]:
    tensors: dict[str, Tensor] = {}
    try:
        with without_values():
            tensors |= meta_inputs(inputs, sequence, batch=1)
            y = take_output(model.eval()(**tensors, return_dict=True), task)
    except Exception as error:
        shapes = " and ".join(f"{name} of shape {list(x.shape)}" for name, x in tensors.items())
        raise BaseModelError(f"{label} does not run on {shapes} alone: {error}") from error
    return tuple(y.shape[1:])


def _steps(model: Any, label: str) -> str:
    """How many steps the convolutions leave of a sequence, which is (sequence + a) // b."""
    count = getattr(model, "_get_feat_extract_output_lengths", None)
    if count is None:
        raise BaseModelError(
            f"{label} takes input_values, and does not say how many steps come of so many samples;"
            " it cannot be built"
        )
    counts = count(torch.arange(1, _MOST_SAMPLES)).tolist()
    if 3 not in counts:
        raise BaseModelError(f"{label} gives no third step of {_MOST_SAMPLES} samples")
    first, second, third = (1 + counts.index(step) for step in (1, 2, 3))
    stride = second - first
    form = f"(sequence{stride - first:+d})//{stride}"
    assert third == second + stride, f"{form}: strides of a convolution are equal"
    return form
