"""Run loraexport artifacts on onnxruntime: every row of a batch with its own LoRA adapter.

Needs numpy, onnxruntime and safetensors; no torch.
"""

from .errors import (
    AdapterConfigError,
    AdapterError,
    AdapterWeightsError,
    ArtifactError,
    BatchError,
    InputError,
    LoraexportError,
    ProviderError,
    SegmentsError,
    SlotsExceededError,
    UnknownAdapterError,
    WeightsError,
)
from .sessions.layers import LayerSession, Session
from .sessions.load import load
from .sessions.model import ModelSession
from .slots.pool import AdapterInfo
from .version import __version__

__all__ = [
    "AdapterConfigError",
    "AdapterError",
    "AdapterInfo",
    "AdapterWeightsError",
    "ArtifactError",
    "BatchError",
    "InputError",
    "LayerSession",
    "LoraexportError",
    "ModelSession",
    "ProviderError",
    "SegmentsError",
    "Session",
    "SlotsExceededError",
    "UnknownAdapterError",
    "WeightsError",
    "__version__",
    "load",
]
