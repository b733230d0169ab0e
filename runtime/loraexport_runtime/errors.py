"""The errors that the runtime raises on purpose.

LoraexportError
├── WeightsError                a weight file is missing, damaged, unsafe, or not finite
├── AdapterError                a PEFT adapter cannot be used
│   ├── AdapterConfigError      a field of adapter_config.json is unknown, unsupported or malformed
│   └── AdapterWeightsError     its tensors are unpaired, misshapen, too large, or fit no site
├── ArtifactError               an artifact is damaged, incomplete, or of another format version
├── ProviderError               an execution provider that was asked for cannot run here
├── StepError                   onnxruntime failed while it computed a request's tokens
├── ClosedError                 a session, a generator or a batcher was closed before this call
└── BatchError                  a batch cannot be served as asked
    ├── UnknownAdapterError     it names an adapter that is not loaded
    ├── UnknownLayerError       it names a layer that the artifact does not have; a KeyError too
    ├── SlotsExceededError      it needs more slots than there are, or none is free
    ├── SlotTimeoutError        its slots were not free in time; a TimeoutError too
    ├── QueueFullError          as many requests wait as may
    ├── RequestTimeoutError     it was not done within its `timeout`; a TimeoutError too
    ├── SegmentsError           its segments do not describe its tokens
    ├── ChatTemplateError       the chat template refuses its messages, or goes past its bounds
    └── InputError              an array has the wrong dtype, width or device, or an argument (a
                                size, a pinned digest) is not of the form it must have

Every message says what is wrong, where, and what to do about it. Whatever a file holds, a message
stays short enough to be read and logged.
"""

from collections.abc import Sequence

MAX_MESSAGE = 2_000
"""Characters: a screen of text, and of the size that log collectors take whole."""
MAX_QUOTED = 200
"""Characters of a value: more than any name or path that someone chose."""


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """A text of at most `limit` characters: the middle is left out, as the advice comes last."""
    if len(text) <= limit:
        return text
    gap = f"… [{len(text) - limit:,} characters or more] …"
    ahead = 2 * (limit - len(gap)) // 3
    return text[:ahead] + gap + text[len(text) - (limit - len(gap) - ahead) :]


def quoted(value: object) -> str:
    """A value from elsewhere as a message shows it: its repr, cut at 200 characters."""
    return shorten(repr(value), MAX_QUOTED)


class LoraexportError(Exception):
    """Anything that loraexport or its runtime raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shorten(message))


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


class StepError(LoraexportError):
    """onnxruntime failed in a step that computed a request's tokens; others go on."""


class NoNumberError(StepError):
    """The model gave no number (NaN) for a request: its adapter or its prompt overflows."""


class ClosedError(LoraexportError):
    """A session, generator or batcher was closed before this call, or is of a fork's parent."""


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


class QueueFullError(BatchError):
    """As many requests, or tokens of them, wait as the queue may hold; nothing was queued."""


class RequestTimeoutError(BatchError, TimeoutError):
    """A request's `timeout` has passed before its last token."""


class SegmentsError(BatchError):
    """The segments of a batch do not describe its tokens."""


class ChatTemplateError(BatchError):
    """The tokenizer's chat template refuses a chat, or takes more than a template may."""

    is_past_bounds = False
    """It takes too many steps, too much time or memory, or does not end."""


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
