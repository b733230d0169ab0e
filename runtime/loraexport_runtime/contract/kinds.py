"""What an artifact is, one of four: layers, a model, a decoder or a graph that existed.

In manifest.json a kind is an object of one key, its tag, with the kind's own values under it:
`"kind": {"model": {"task": …}}`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .genai_config import GENAI_CONFIG

Tag = Literal["layers", "model", "decoder", "graph"]
Packed = Literal["cuda", "any"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


@dataclass(frozen=True)
class TensorEntry:
    """An input or output of a model: each dimension is `batch`, `sequence` or a number."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[str, ...]

    def sizes(self, batch: int, sequence: int) -> list[int]:
        named = {"batch": batch, "sequence": sequence}
        return [named[size] if size in named else int(size) for size in self.shape]


@dataclass(frozen=True)
class Facts:
    """What the base's own config files say for a service; None or empty where they do not."""

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


@dataclass(frozen=True)
class Decoder:
    """A decoder with a KV cache, as onnxruntime-genai takes it, and adapter_ids [batch]."""

    tag: ClassVar[Tag] = "decoder"

    folder: str
    """genai_config.json, the graph, and the tokenizer's files."""
    onnx: str
    pad_token_id: int
    """What a shorter prompt is filled up with: a token that no prompt may hold."""
    max_length: int | None
    """Tokens of a prompt and of what follows it, together."""
    vocab_size: int | None

    def files(self) -> list[str]:
        """The paths that a decoder cannot do without."""
        return [self.onnx, f"{self.folder}/{GENAI_CONFIG}"]


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
