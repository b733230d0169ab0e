"""A Hugging Face directory's vocabulary -> tokenizer.json, which needs no transformers."""

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from loraexport_runtime.contract.foreign import read_object, require_file

from ..errors import BaseModelError
from .model import no_progress_bar
from .quiet import quiet_models

TOKENIZER_FILE = "tokenizer.json"
_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
)
_VOCABULARIES = ("vocab.*", "merges.txt", "*.model", "*.tiktoken")
_TEXTS = (
    "Tenants share one base; each row has its own adapter.",
    "  Two  spaces,\ttabs\nand CAPITALS, 3.14 % of 1,000,000",
    "naïve café, Straße, Ελλάδα, 日本語, 한국어, 🙂",
    "def f(x): return {'a': [x ** 2, -1]}  # <s> [CLS] </s>",
    "",
)
"""Of words, spaces, digits, scripts, code, and what looks like a special token."""


def find_files(directory: Path) -> list[Path]:
    """The files of a directory's tokenizer and image processor, by name.

    Raises:
        BaseModelError: one of them cannot be read, is no JSON, or no tokenizer.
    """
    files = sorted({file for pattern in _FILES for file in directory.glob(pattern)})
    for file in files:
        require_file(file, BaseModelError)
        if file.suffix == ".json":
            read_object(file, BaseModelError)
        if file.name == TOKENIZER_FILE:
            _read_tokenizer(file)
    return files


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise BaseModelError(
            f"{file}: no tokenizer that the tokenizers library reads: {error}; copy or download it"
            " again, or remove it if there is a vocabulary beside it"
        ) from error


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory holds a vocabulary of any kind."""
    return any(file.is_file() for pattern in _VOCABULARIES for file in directory.glob(pattern))


def write_tokenizer(directory: Path, file: Path) -> str | None:
    """Write the tokenizer of a directory as one file, which encodes what transformers encodes.

    Args:
        file: where to; its folder is made.

    Returns:
        None; or why there is no such file, which then is not written.
    """
    if not has_vocabulary(directory):
        return f"{directory} has neither {TOKENIZER_FILE} nor a vocabulary"
    try:
        with quiet_models(), no_progress_bar():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # of whatever reads this kind of vocabulary
        said = (str(error).strip().splitlines() or ["no message"])[0]
        return f"transformers cannot read the vocabulary of {directory}: {said}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"the {type(tokenizer).__name__} of {directory} has no fast form in transformers"
    # Without its files, a class makes a tokenizer of special tokens alone.
    if len(backend.get_vocab(with_added_tokens=False)) <= len(tokenizer.all_special_tokens):
        return f"transformers finds no vocabulary for a {type(tokenizer).__name__} in {directory}"
    file.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(file))
    saved = _read_tokenizer(file)
    differing = [one for one in _TEXTS if saved.encode(one).ids != tokenizer(one)["input_ids"]]
    if differing:
        file.unlink()
        return (
            f"the {type(tokenizer).__name__} of {directory} encodes {differing[0]!r} otherwise than"
            f" its own {TOKENIZER_FILE} does"
        )
    return None
