"""Logits -> probabilities and their names; a pair of texts -> how well they fit."""

from collections.abc import Sequence

import numpy as np

from loraexport_runtime.contract.kinds import Model

from ..errors import ApiError, invalid, unsupported
from .encoder import EncoderHost

_LOGITS, _SCORES = "logits", "scores"
"""Outputs of a classifier: as its head gives them, or behind the activation of a CrossEncoder."""


def label_output(host: EncoderHost, task: str) -> str:
    """The output with a classifier's labels. Raises ApiError (400): it has none of this task."""
    if host.model.task != task:
        raise invalid(
            f"`{host.name}` is of task {host.model.task}, and this needs one of task {task}",
            "model",
        )
    return host.model.outputs[0].name


def label_names(host: EncoderHost, count: int) -> list[str]:
    """The labels in the order of a classifier's outputs; LABEL_0, … where it has no names."""
    return names_of(host.model, count)


def names_of(model: Model, count: int) -> list[str]:
    """The same of a model that is not open."""
    names = model.facts.id2label
    return [names.get(str(index), f"LABEL_{index}") for index in range(count)]


def probabilities(host: EncoderHost, values: np.ndarray, use_activation: bool | None) -> np.ndarray:
    """float32 [..., labels] of a classifier's output of that shape.

    softmax(z) where a text has one label, 1 / (1 + exp(-z)) where it may have several or there is
    one output, and z of a regression. A label that the adapter's own head lacks has 0.

    Args:
        use_activation: False: z as it is.

    Raises:
        ApiError: 400: the graph has applied its activation, and it cannot be left out.
    """
    if host.model.outputs[0].name == _SCORES:
        if use_activation is False:
            raise unsupported("use_activation", "the model's graph applies its own; leave it out")
        return values
    if use_activation is False or host.model.facts.problem_type == "regression":
        return values
    several = host.model.facts.problem_type == "multi_label_classification"
    return sigmoid(values) if several or values.shape[-1] == 1 else softmax(values)


def fit_scores(host: EncoderHost, values: np.ndarray, use_activation: bool | None) -> np.ndarray:
    """How well pairs fit, float32 [n], of a cross-encoder's output [n, 1].

    Raises:
        ApiError: 400: the model has several labels; see `probabilities`.
    """
    if values.shape[-1] != 1:
        raise ApiError(
            400,
            f"`{host.name}` has {values.shape[-1]} labels, and a score needs a model with one",
            code="invalid_request",
            param="model",
        )
    if host.model.outputs[0].name == _LOGITS and use_activation is not False:
        return sigmoid(values)[:, 0]
    return probabilities(host, values, use_activation)[:, 0]


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """cos of the vectors [n, width] row by row, float32 [n]."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    values: np.ndarray = (first * second).sum(axis=1) / np.maximum(lengths, 1e-12)
    return values


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), of any z."""
    e = np.exp(-np.abs(z.astype(np.float64)))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e)).astype(np.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    """exp(z) / sum exp(z) over the last dimension."""
    wide = z.astype(np.float64)
    e = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True)).astype(np.float32)


def best(values: np.ndarray, names: Sequence[str]) -> str:
    """The name of the likeliest label."""
    return names[int(values.argmax())]
