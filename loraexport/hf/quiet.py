"""What transformers and PEFT say of training, or of their own code, kept off a build's screen."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "transformers.modeling_utils",
    "torch.onnx._internal.exporter._registration",
    # A graph to graft into may be of an older opset, to which what is exported is converted.
    "torch.onnx._internal.exporter._compat",
    "onnxscript.version_converter",
)
_WARNINGS = (
    # Tracing reads every attribute of a model, deprecated ones too; PEFT reads this one.
    (r".*is_gradient_checkpointing", FutureWarning),
    # PEFT speaks of merging into a tied layer; a site beside it leaves the embedding alone.
    (r".*tie_word_embeddings", UserWarning),
    # DeBERTa makes a tensor of a size, which under tracing is a tensor already.
    (r"To copy construct from a tensor", UserWarning),
    # PEFT corrects fan_in_fan_out by the class of the layer, as the exporter does.
    (r"fan_in_fan_out is set to", UserWarning),
)


@contextmanager
def quiet_models() -> Iterator[None]:
    """Hide the messages above that nobody can act on; errors and other warnings stay."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    with warnings.catch_warnings():
        for message, category in _WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        for logger in loggers:
            # Not its level: at another one transformers logs what it else keeps to itself.
            logger.addFilter(_is_error)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
