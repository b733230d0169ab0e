"""The errors that the runtime raises on purpose.

LoraexportError
├── WeightsError                a weight file is missing, damaged, unsafe, or not finite
├── AdapterError                a PEFT adapter cannot be used
│   ├── AdapterConfigError      a field of adapter_config.json is unknown, unsupported or malformed
│   └── AdapterWeightsError     its tensors are unpaired, misshapen, too large, or fit no site
├── ArtifactError               an artifact is damaged, incomplete, or of another format version
├── ProviderError               an execution provider that was asked for cannot run here
├── ClosedError                 a session or a generator was closed before this call
└── BatchError                  a batch cannot be served as asked
    ├── UnknownAdapterError     it names an adapter that is not loaded
    ├── UnknownLayerError       it names a layer that the artifact does not have; a KeyError too
    ├── SlotsExceededError      it needs more slots than there are, or none is free
    ├── SlotTimeoutError        its slots were not free in time; a TimeoutError too
    ├── SegmentsError           its segments do not describe its tokens
    └── InputError              an array has the wrong dtype, width or device, or an argument (a
                                size, a pinned digest) is not of the form it must have

Every message says what is wrong, where, and what to do about it.
"""

from collections.abc import Sequence


class LoraexportError(Exception):
    """Anything that loraexport or its runtime raises on purpose."""


class WeightsError(LoraexportError):
    """A weight file is missing, damaged, unsafe to read, or holds NaN or Inf."""


class AdapterError(LoraexportError):
    """A PEFT adapter cannot be used."""


class AdapterConfigError(AdapterError):
    """A field of adapter_config.json is unknown, unsupported or malformed."""


class AdapterWeightsError(AdapterError):
    """An adapter's tensors are unpaired, misshapen, too large, or fit no site."""


class ArtifactError(LoraexportError):
    """An artifact is damaged, incomplete, or of another format version."""


class ProviderError(LoraexportError):
    """An execution provider that was asked for cannot run here."""


class ClosedError(LoraexportError):
    """A session or a generator was closed before this call."""


class BatchError(LoraexportError):
    """A batch cannot be served as asked."""


class UnknownAdapterError(BatchError):
    """A batch names an adapter that is not loaded."""


class UnknownLayerError(BatchError, KeyError):
    """A session of layers has no layer of this name."""

    def __str__(self) -> str:  # a KeyError's is the repr of its text
        return str(self.args[0])


class SlotsExceededError(BatchError):
    """A batch needs more slots than the artifact has, or no slot is free for a load."""


class SlotTimeoutError(BatchError, TimeoutError):
    """The slots of a run, a load or a pin were not free within its `timeout`; nothing changed."""


class SegmentsError(BatchError):
    """The segments of a batch do not describe its tokens."""


class InputError(BatchError):
    """An array has the wrong dtype, width or device; or an argument is not of its form."""


EXIT_CODES: tuple[tuple[type[LoraexportError], int], ...] = (
    (ProviderError, 2),
    (BatchError, 2),
    (WeightsError, 4),
    (AdapterError, 4),
    (ArtifactError, 5),
)


def exit_code(
    error: LoraexportError, codes: Sequence[tuple[type[LoraexportError], int]] = EXIT_CODES
) -> int:
    """The process exit code that stands for an error; 1 for a kind that the codes leave out."""
    return next((code for kind, code in codes if isinstance(error, kind)), 1)
