"""The folder of a decoder as onnxruntime-genai takes it: its config, and the token that pads."""

import json
from pathlib import Path
from typing import Any

import transformers

from loraexport_runtime.contract.genai_config import GENAI_CONFIG, end_tokens, read_genai_config
from loraexport_runtime.contract.kinds import Decoder

from ..errors import BaseModelError
from ..hf.tokenizer import TOKENIZER_FILE, find_files, write_tokenizer

FOLDER = "generator"


def require_tokenizer(directory: Path, folder: Path) -> None:
    """Check the base's tokenizer; make tokenizer.json of its vocabulary where it has none.

    Args:
        directory: the base.
        folder: gets the file.

    Raises:
        BaseModelError: it is damaged, or cannot be made; onnxruntime-genai opens no folder without.
    """
    if TOKENIZER_FILE in {file.name for file in find_files(directory)}:
        return  # it is copied with the others
    why = write_tokenizer(directory, folder / TOKENIZER_FILE)
    if why:
        raise BaseModelError(
            f"{directory}: no tokenizer.json, which onnxruntime-genai needs ({why}); save the"
            " model's tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
        )


def adapt_config(folder: Path) -> int:
    """Give the config our padding, and no warning for every stack that it can be overridden.

    Returns:
        The padding: a token that no prompt holds, as onnxruntime-genai takes it for padding
        wherever it stands.
    """
    data = read_genai_config(folder, BaseModelError)
    pad = _choose_pad(folder, data["model"])
    data["model"]["pad_token_id"] = pad
    data["model"]["decoder"].setdefault("session_options", {})["log_severity_level"] = 3
    (folder / GENAI_CONFIG).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")
    return pad


def describe(folder: Path, pad: int) -> Decoder:
    """What a manifest says of the folder; `pad`: see `adapt_config`."""
    model = read_genai_config(folder)["model"]
    return Decoder(
        FOLDER,
        f"{FOLDER}/model.onnx",
        pad,
        max_length=int(model["context_length"]),
        vocab_size=int(model["vocab_size"]),
    )


def _choose_pad(folder: Path, config: dict[str, Any]) -> int:
    """The tokenizer's own, unless it also ends or starts a text; else an added token that its chat
    template does not write; at last the highest id.
    """
    ends = {*end_tokens(config), config.get("bos_token_id")}
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and pad >= 0 and pad not in ends:
        return pad
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of whatever reads this kind of tokenizer
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise BaseModelError(
            f"{folder}: transformers cannot read the tokenizer: {said}; save it there again"
        ) from error
    template = str(tokenizer.chat_template or "")
    for index, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        text = str(token)
        known = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        if index not in ends | known and text not in template and index < config["vocab_size"]:
            return int(index)
    return int(config["vocab_size"]) - 1
