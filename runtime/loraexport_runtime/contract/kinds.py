"""What an artifact is, one of four: layers, a model, a decoder or a graph that existed.

In manifest.json a kind is an object of one key, its tag, with the kind's own values under it:
`"kind": {"model": {"task": …}}`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

from .genai_config import GENAI_CONFIG

Tag = Literal["layers", "model", "decoder", "graph"]
Packed = Literal["cuda", "any"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


_MORE = re.compile(r"sequence\+([1-9][0-9]{0,9})")
_STEPS = re.compile(r"\(sequence([+-][0-9]{1,10})\)//([1-9][0-9]{0,9})")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True)
class TensorEntry:
    """An input or output of a model: each dimension is `batch`, `sequence` or a number.

    An output's may follow from the sequence: `sequence+5`, where a picture's patches stand behind a
    text's tokens, and `(sequence-80)//320`, the steps that convolutions leave of so many samples.
    """

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[str, ...]

    def __str__(self) -> str:
        """As `input_ids int64 [batch, sequence]`."""
        return f"{self.name} {self.dtype} [{', '.join(self.shape)}]"

    def sizes(self, batch: int, sequence: int) -> list[int]:
        """The shape of a batch; a dimension may be 0 or less for a sequence that is too short."""
        sizes_by_name = {"batch": batch, "sequence": sequence}
        return [
            sizes_by_name[size] if size in sizes_by_name else _size(size, sequence)
            for size in self.shape
        ]


@lru_cache(4096)
def _size(dimension: str, sequence: int) -> int:
    if more := _MORE.fullmatch(dimension):
        return sequence + int(more[1])
    if steps := _STEPS.fullmatch(dimension):
        return (sequence + int(steps[1])) // int(steps[2])
    return int(dimension)


def sequence_of(outputs: Iterable[TensorEntry], steps: int) -> int:
    """The shortest sequence of so many steps of an output: as many, but for convolutions."""
    for dimension in (size for entry in outputs for size in entry.shape):
        if found := _STEPS.fullmatch(dimension):
            return steps * int(found[2]) - int(found[1])
    return steps


def is_dimension(text: str, most: int, derived: bool) -> bool:
    """Whether a text is a dimension whose numbers are at most `most`.

    Args:
        derived: whether it may follow from the sequence, as an output's may.
    """
    if text in ("batch", "sequence"):
        return True
    forms = (_NUMBER, _MORE, _STEPS) if derived else (_NUMBER,)
    return any(form.fullmatch(text) for form in forms) and all(
        int(number) <= most for number in re.findall("[0-9]+", text)
    )


@dataclass(frozen=True)
class Facts:
    """What the base's own config files, or its graph's tables, say for a service.

    None or empty where they do not.
    """

    max_length: int | None
    """Tokens of a text, those that begin and end it too."""
    vocab_size: int | None
    pad_token_id: int | None
    id2label: dict[str, str]
    """Of a classifier: the name of each output."""
    problem_type: ProblemType | None
    prompts: dict[str, str]
    """What to put before a text, by what it is for (sentence-transformers)."""
    default_prompt_name: str | None
    max_box: int | None
    """The largest coordinate of a token's box (`bbox`), and the largest width and height."""
    positions: int | None
    """Tokens of a row at most, padding too, where positions are looked up in a table that ends;
    where position_ids are an input, how many of them there are."""
    type_vocab_size: int | None
    """How many token_type_ids there are."""


@dataclass(frozen=True)
class Layers:
    """Single layers, a graph each: the layers themselves name the files."""

    tag: ClassVar[Tag] = "layers"

    def files(self) -> list[str]:
        """No files but those of the layers."""
        return []


@dataclass(frozen=True)
class Model:
    """One graph of a whole model. One more input: adapter_ids int64 [batch], each row's slot."""

    tag: ClassVar[Tag] = "model"

    task: str
    blend: bool
    """Another input, optional: adapter_weights float32 [batch, slots], what to add of each slot."""
    packed: Packed | None
    """Texts are computed without their padding, by an operator of CUDA alone or by any provider's;
    what stands for padding in an output is 0."""
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    onnx: str | None
    torchscript: str | None
    facts: Facts

    def files(self) -> list[str]:
        """The paths of this model's files inside the artifact."""
        return [path for path in (self.onnx, self.torchscript) if path]


ADAPTER_WEIGHTS = "adapter_weights"
"""An input of graphs whose rows may blend, float32 [rows, slots]; it need not be fed, and zeros
stand for it."""
ROWS = "loraexport/rows"
"""An input, int64 [rows, told]: the tokens of each row, among the batch * n that are read, after
which there are logits. The last of them gives the row's next token."""
LENGTHS = "loraexport/lengths"
"""An input, int64 [rows, 1]: the tokens of each row, with those that are read now."""
GOES_ON = "loraexport/goes_on"
"""An input, int64 [rows, 1]: 1 for a row that the next step continues, 0 for one whose length and
position stay."""
PLACES = "loraexport/places"
"""An input, int64 [1, length]: 0, 1, … length - 1."""


@dataclass(frozen=True)
class StepGraphs:
    """The graphs by which the runtime generates."""

    step: str
    """The decoder's, of the same weights, with nodes that give the likeliest tokens, and what else
    the next step takes."""
    top_tokens: str
    """The highest logits of rows."""
    row_logits: str
    """All logits of rows."""

    def files(self) -> list[str]:
        """Their paths inside the artifact."""
        return [self.step, self.top_tokens, self.row_logits]


@dataclass(frozen=True)
class Decoder:
    """A decoder with a KV cache, as onnxruntime-genai takes it, and adapter_ids [batch]."""

    tag: ClassVar[Tag] = "decoder"

    folder: str
    """genai_config.json, the graph, and the tokenizer's files."""
    onnx: str
    blend: bool
    """As a Model's."""
    max_length: int | None
    """Tokens of a prompt and of what follows it, together."""
    vocab_size: int | None
    lengths: tuple[int, ...]
    """Tokens of a text up to which the model computes one thing and beyond another, in order."""
    reread_length: int | None
    """A text that grows beyond it is read again from its start, as all its tokens change."""
    steps: StepGraphs | None
    """None: of format 4, whose tokens the host chooses."""

    def files(self) -> list[str]:
        """The paths that a decoder cannot do without."""
        steps = [] if self.steps is None else self.steps.files()
        return [self.onnx, f"{self.folder}/{GENAI_CONFIG}", *steps]


@dataclass(frozen=True)
class Graph:
    """An ONNX graph that existed, with multi-LoRA grafted into it; used as a model is."""

    tag: ClassVar[Tag] = "graph"

    model: Model

    def files(self) -> list[str]:
        """The paths of the graph's files inside the artifact."""
        return self.model.files()


Kind = Layers | Model | Decoder | Graph


def packed_of(kind: Kind) -> Packed | None:
    """How a kind's texts are packed; None where they are not, or it has none."""
    match kind:
        case Model(packed=packed):
            return packed
        case _:
            return None
