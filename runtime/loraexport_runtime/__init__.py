"""Run loraexport artifacts on onnxruntime: every row of a batch with its own LoRA adapter.

Needs numpy, ml_dtypes, onnxruntime, regex and safetensors; no torch. Decoders need tokenizers and
Jinja2.
It logs to the logger "loraexport_runtime", and changes nothing that the whole process shares.
"""

import logging

from .device.installed import check_installed

check_installed()

from .batching.batcher import Batcher  # noqa: E402
from .batching.stats import BatcherStats  # noqa: E402
from .errors import (  # noqa: E402  what follows imports onnxruntime
    AdapterConfigError,
    AdapterError,
    AdapterWeightsError,
    ArtifactError,
    BatchError,
    ChatTemplateError,
    ClosedError,
    InputError,
    LoraexportError,
    NoNumberError,
    ProviderError,
    QueueFullError,
    RequestTimeoutError,
    SegmentsError,
    SlotsExceededError,
    SlotTimeoutError,
    StepError,
    UnknownAdapterError,
    UnknownLayerError,
    WeightsError,
)
from .generation.answers import Completion, Piece  # noqa: E402
from .generation.engine import GenerationEngine  # noqa: E402
from .generation.generator import TextGenerator  # noqa: E402
from .generation.grammar import Grammar  # noqa: E402
from .generation.handle import (  # noqa: E402
    GeneratedAnswer,
    GeneratedToken,
    Generation,
    GenerationHandle,
)
from .generation.load import load_generator  # noqa: E402
from .generation.request import GenerationRequest  # noqa: E402
from .generation.stats import GenerationStats  # noqa: E402
from .generation.text.defaults import GenerationDefaults  # noqa: E402
from .generation.text.tokenizer import Tokenizer  # noqa: E402
from .sessions.layers import LayerSession, LayersSession  # noqa: E402
from .sessions.load import load, load_layers, load_model  # noqa: E402
from .sessions.model import ModelSession  # noqa: E402
from .sessions.session import ArtifactSession  # noqa: E402
from .sessions.stats import SessionStats  # noqa: E402
from .slots.info import AdapterInfo  # noqa: E402
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
    "Batcher",
    "BatcherStats",
    "ChatTemplateError",
    "ClosedError",
    "Completion",
    "GeneratedAnswer",
    "GeneratedToken",
    "Generation",
    "GenerationDefaults",
    "GenerationEngine",
    "GenerationHandle",
    "GenerationRequest",
    "GenerationStats",
    "Grammar",
    "InputError",
    "LayerSession",
    "LayersSession",
    "LoraexportError",
    "ModelSession",
    "NoNumberError",
    "Piece",
    "ProviderError",
    "QueueFullError",
    "RequestTimeoutError",
    "SegmentsError",
    "SessionStats",
    "SlotTimeoutError",
    "SlotsExceededError",
    "StepError",
    "TextGenerator",
    "Tokenizer",
    "UnknownAdapterError",
    "UnknownLayerError",
    "WeightsError",
    "__version__",
    "load",
    "load_generator",
    "load_layers",
    "load_model",
]
