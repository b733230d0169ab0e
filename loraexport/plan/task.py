"""The tasks that a config.json's architectures stand for, and those that a base cannot do."""

from pathlib import Path

from ..errors import BaseModelError
from ..hf.folder import read_values

TASKS = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "causal-lm",
    "ForImageClassification": "image-classification",
    "VisionModelWithProjection": "image-embedding",
    "TextModelWithProjection": "text-embedding",
    "AudioModelWithProjection": "audio-embedding",
}
"""By the end of a class's name."""

GENERATING = frozenset(
    f"{family}ForCausalLM"
    for family in (
        *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2"),
        *("Phi", "Phi3", "SmolLM3", "Granite"),
    )
)
"""Classes that `kind: causal_lm` is proven with; another one may do."""


def read_architectures(directory: Path) -> list[str]:
    """The classes that a config.json names; none where it does not say.

    Raises:
        BaseModelError: there is no config.json, it is broken, or asks for what is refused.
    """
    return read_values(directory).get("architectures") or []


def check_task(directory: Path, task: str) -> None:
    """Refuse to read a classifier of one kind as one of another, whose head has the same names.

    Raises:
        BaseModelError: it is one, and its numbers would be of no training.
    """
    names = read_architectures(directory)
    stands_for = {TASKS[end]: name for name in names for end in TASKS if name.endswith(end)}
    classifiers = {
        trained: name for trained, name in stands_for.items() if trained.endswith("classification")
    }
    if task.endswith("classification") and classifiers and task not in classifiers:
        (trained, name), *_ = classifiers.items()
        raise BaseModelError(
            f"{directory / 'config.json'}: it is a {name}, whose head was trained for {trained},"
            f" and the spec says {task}; give task: {trained}, or a base that was trained for"
            f" {task}"
        )
