"""A request on its way through the engine's thread: what its answers share, and each answer."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...errors import LoraexportError, StepError
from ...slots.lease import Lease
from ..handle import GenerationHandle
from ..request import GenerationRequest
from ..sampling import Sampler


class StopText(Protocol):
    """An answer's text, as far as it says whether a stop string has come."""

    stopped: str | None
    """The one that has."""

    def push(self, token: int) -> str:
        """One more token."""


@dataclass(eq=False)
class Job:
    """A request, and what its answers share."""

    request: GenerationRequest
    prompt: np.ndarray
    handle: GenerationHandle
    end: float | None
    """When its time is over, by `time.monotonic`."""
    num_open: int
    lease: Lease | None = None
    """From the first answer's admission to the last one's end."""
    is_reported: bool = False
    """The prompt's own logprobs have been told, or are being."""


@dataclass(eq=False)
class Answer:
    """One answer of a request, in the queue or in a row."""

    job: Job
    index: int
    sampler: Sampler
    ends: frozenset[int]
    text: StopText | None
    num_tokens: int = 0
    num_passed: int = 0
    """How many prompts that came later were read ahead of it."""
    order: int = 0
    goes_on: bool = False
    """Its prompt is read, so that a step gives its next token."""
    reports: bool = False
    """The prompt's logprobs are told while it reads it."""
    again: np.ndarray | None = None
    """What is read in place of the prompt: its text so far, which has to be read anew."""
    refusal: BaseException | None = None
    """Why it cannot be admitted at all."""

    @property
    def prompt(self) -> np.ndarray:
        """int64 [n]: what is read before steps give its tokens."""
        return self.job.prompt if self.again is None else self.again

    @property
    def takes_likeliest(self) -> bool:
        """Whether the graph tells all that is asked of its next token."""
        return self.sampler.takes_likeliest and self.job.request.logprobs is None


def step_error(error: Exception) -> StepError:
    """What those are told whose step failed."""
    if isinstance(error, LoraexportError):
        return StepError(str(error))
    return StepError(f"onnxruntime failed in the step that this request was in: {error}")
