"""A Hugging Face directory's vocabulary -> tokenizer.json, which needs no transformers.

A tokenizer that is code of the base's own is never run: its tokenizer.json is taken, or nothing.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers

from loraexport_runtime.contract.foreign import has_file, read_object, require_file
from loraexport_runtime.errors import quoted

from ..errors import BaseModelError
from .folder import (
    CONFIG,
    TOKENIZER_CLASS,
    foreign_classes,
    require_copyable,
    require_plain_files,
)
from .quiet import quiet_models

TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "tokenizer*.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    *_PROCESSOR_CONFIGS,
)
_VOCABULARIES = ("vocab.*", "merges.txt", "*.model", "*.tiktoken")
TEXTS = (
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
        BaseModelError: one of them cannot be read, is no JSON, or no tokenizer; or a processor is
            code of the base's own.
    """
    require_plain_files(directory)
    files = sorted({file for pattern in _FILES for file in directory.glob(pattern)})
    for file in files:
        require_file(file, BaseModelError)
        require_copyable(file)
        values = read_object(file, BaseModelError) if file.suffix == ".json" else {}
        names = foreign_classes(values, {}) if file.name in _PROCESSOR_CONFIGS else None
        if names:
            raise BaseModelError(
                f"{file}: auto_map names code of the base's own ({quoted(names)}), which is never"
                " run, and what it makes of an input is not known here. Does transformers' own"
                f" processor make the same, remove auto_map from {file.name}"
            )
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


def fold_case(file: Path) -> None:
    """Make a tokenizer.json encode every text as it does its small letters, unless it does."""
    tokenizer = _read_tokenizer(file)
    if all(tokenizer.encode(text).ids == tokenizer.encode(text.lower()).ids for text in TEXTS):
        return
    lowercase, normalizer = normalizers.Lowercase(), tokenizer.normalizer
    steps = [lowercase] if normalizer is None else [lowercase, normalizer]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.save(str(file))


def require_tokenizer(directory: Path) -> None:
    """Raise BaseModelError unless a directory has a tokenizer.json, or what one can be made of."""
    why = None if TOKENIZER_FILE in _names(directory) else _lacks_source(directory)
    if why:
        raise no_tokenizer(directory, why)


def no_tokenizer(directory: Path, why: str) -> BaseModelError:
    """The refusal of a base that generates, and has no tokenizer.json."""
    return BaseModelError(
        f"{directory}: no tokenizer.json, which a decoder needs ({why}); save the model's"
        " tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
    )


def _names(directory: Path) -> set[str]:
    return {file.name for file in find_files(directory)}


def _lacks_source(directory: Path) -> str | None:
    """Why no tokenizer.json can be made of a directory's files, as far as their names tell."""
    names = _own_tokenizer(directory)
    if names:
        return (
            f"the tokenizer of {directory} is code of the base's own ({quoted(names)}, by"
            " auto_map), which is never run"
        )
    if not any(file.is_file() for pattern in _VOCABULARIES for file in directory.glob(pattern)):
        return f"{directory} has neither {TOKENIZER_FILE} nor a vocabulary"
    return None


def _own_tokenizer(directory: Path) -> str | None:
    """The tokenizer's class, where config files say that it is none of transformers'."""
    for name in (_TOKENIZER_CONFIG, CONFIG):
        if has_file(directory / name):
            auto_map = read_object(directory / name, BaseModelError).get("auto_map")
            names = auto_map.get(TOKENIZER_CLASS) if isinstance(auto_map, dict) else auto_map
            if names:  # its class, or a list of a slow and a fast one
                return str(names)
    return None


def drop_code(folder: Path) -> None:
    """Take auto_map out of a copied tokenizer's config: by it others would run the base's code."""
    file = folder / _TOKENIZER_CONFIG
    values = read_object(file, BaseModelError) if has_file(file) else {}
    if values.pop("auto_map", None):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


def write_tokenizer(directory: Path, file: Path) -> str | None:
    """Write the tokenizer of a directory as one file, which encodes what transformers encodes.

    Args:
        file: where to; its folder is made.

    Returns:
        None; or why there is no such file, which then is not written.
    """
    why = _lacks_source(directory)
    if why:
        return why
    import transformers

    from .model import no_progress_bar

    for pattern in _VOCABULARIES:
        for vocabulary in directory.glob(pattern):
            require_copyable(vocabulary)
    try:
        with quiet_models(), no_progress_bar():
            read = transformers.AutoTokenizer.from_pretrained
            tokenizer: Any = read(directory, trust_remote_code=False)
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
    differing = [text for text in TEXTS if saved.encode(text).ids != tokenizer(text)["input_ids"]]
    if differing:
        file.unlink()
        return (
            f"the {type(tokenizer).__name__} of {directory} encodes {differing[0]!r} otherwise than"
            f" its own {TOKENIZER_FILE} does"
        )
    return None
