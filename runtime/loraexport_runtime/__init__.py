"""Run loraexport artifacts on onnxruntime: every row of a batch with its own LoRA adapter.

Needs numpy, ml_dtypes, safetensors and onnxruntime; no torch. It logs to the logger
"loraexport_runtime", and changes nothing that the whole process shares.
"""

import logging

from .device.installed import check_installed

check_installed()

from .errors import (  # noqa: E402  what follows imports onnxruntime
    AdapterConfigError,
    AdapterError,
    AdapterWeightsError,
    ArtifactError,
    BatchError,
    ClosedError,
    InputError,
    LoraexportError,
    ProviderError,
    SegmentsError,
    SlotsExceededError,
    SlotTimeoutError,
    UnknownAdapterError,
    UnknownLayerError,
    WeightsError,
)
from .generation.generator import Completion, Piece, TextGenerator  # noqa: E402
from .generation.load import load_generator  # noqa: E402
from .sessions.layers import LayerSession, LayersSession  # noqa: E402
from .sessions.load import load, load_layers, load_model  # noqa: E402
from .sessions.model import ModelSession  # noqa: E402
from .sessions.session import ArtifactSession  # noqa: E402
from .sessions.stats import SessionStats  # noqa: E402
from .slots.pool import AdapterInfo  # noqa: E402
from .version import __version__  # noqa: E402

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "AdapterConfigError",
    "AdapterError",
    "AdapterInfo",
    "AdapterWeightsError",
    "ArtifactError",
    "ArtifactSession",
    "BatchError",
    "ClosedError",
    "Completion",
    "InputError",
    "LayerSession",
    "LayersSession",
    "LoraexportError",
    "ModelSession",
    "Piece",
    "ProviderError",
    "SegmentsError",
    "SessionStats",
    "SlotTimeoutError",
    "SlotsExceededError",
    "TextGenerator",
    "UnknownAdapterError",
    "UnknownLayerError",
    "WeightsError",
    "__version__",
    "load",
    "load_generator",
    "load_layers",
    "load_model",
]
