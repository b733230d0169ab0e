"""The folder of a decoder as onnxruntime-genai takes it: its config and tokenizer."""

import json
from pathlib import Path

from loraexport_runtime.contract.genai_config import GENAI_CONFIG, read_genai_config
from loraexport_runtime.contract.kinds import Decoder, StepGraphs
from loraexport_runtime.generation.steps.files import STEP_FILES

from ..errors import BaseModelError
from ..hf.positions import Positions
from ..hf.tokenizer import TOKENIZER_FILE, find_files, no_tokenizer, write_tokenizer

FOLDER = "generator"


def make_tokenizer(directory: Path, folder: Path) -> None:
    """Check the base's tokenizer; make tokenizer.json of its vocabulary where it has none.

    Args:
        directory: the base.
        folder: gets the file.

    Raises:
        BaseModelError: it is damaged, or cannot be made; a decoder takes no text without.
    """
    if TOKENIZER_FILE in {file.name for file in find_files(directory)}:
        return  # it is copied with the others
    why = write_tokenizer(directory, folder / TOKENIZER_FILE)
    if why:
        raise no_tokenizer(directory, why)


def adapt_config(folder: Path) -> None:
    """Have the config speak of caches of full length in every layer, and give no warning for every
    stack that it can be overridden."""
    data = read_genai_config(folder, BaseModelError)
    data["model"]["decoder"].pop("sliding_window", None)
    data["model"]["decoder"].setdefault("session_options", {})["log_severity_level"] = 3
    (folder / GENAI_CONFIG).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")


def describe(folder: Path, positions: Positions, blend: bool) -> Decoder:
    """What a manifest says of the folder."""
    model = read_genai_config(folder)["model"]
    lengths = positions.lengths(int(model["context_length"]))
    return Decoder(
        FOLDER,
        f"{FOLDER}/model.onnx",
        blend=blend,
        max_length=int(model["context_length"]),
        vocab_size=int(model["vocab_size"]),
        lengths=lengths,
        reread_length=positions.reread_length if positions.reread_length in lengths else None,
        steps=StepGraphs(*(f"{FOLDER}/{name}" for name in STEP_FILES)),
    )
