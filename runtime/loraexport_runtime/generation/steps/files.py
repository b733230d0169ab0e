"""Where the graphs lie by which a decoder generates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

STEP_FILES = ("step.onnx", "top_tokens.onnx", "row_logits.onnx")
"""As the exporter calls them, beside the decoder's own graph."""


@dataclass(frozen=True)
class StepFiles:
    """The files of an artifact's step graphs; see StepGraphs of its manifest."""

    step: Path
    top_tokens: Path
    row_logits: Path

    @classmethod
    def of(cls, folder: Path) -> Self:
        """As the exporter writes them into a decoder's folder."""
        return cls(*(folder / name for name in STEP_FILES))
