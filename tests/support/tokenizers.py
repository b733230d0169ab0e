"""Tiny tokenizers in the ways of the published ones: bytes, metaspaces with bytes, words."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers as tf
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from loraexport_runtime.generation.text.chat import ChatTemplates
from loraexport_runtime.generation.text.files import special_tokens
from loraexport_runtime.generation.text.tokenizer import Tokenizer as RuntimeTokenizer

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
TURNS = ("<|im_start|>", "<|im_end|>")
_TEXTS = ["hello world, isn't the adapter 's batch it ? naïve café 日本語 🙂 don't , stop ."] * 4


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: every token is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, **_shown()))
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2 and Mistral: a space is a letter, and what has no token is bytes; with BOS."""
    data = json.loads(_letters().to_str())
    vocabulary = data["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    model = models.BPE(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in data["model"]["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XGLM: metaspaces are the decoder's own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _train(tokenizer, trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **_shown()))
    return tokenizer


def word_pieces() -> Tokenizer:
    """As BERT's: pieces are joined, words are separated."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=150, **_shown()))
    return tokenizer


def words() -> Tokenizer:
    """Without a decoder: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    _train(tokenizer, trainers.WordLevelTrainer(**_shown()))
    return tokenizer


def backwards() -> Tokenizer:
    """A decoder that looks far behind: what ends a text may become something else later."""
    tokenizer = metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 2),
            decoders.Replace("th", "þ"),
        ]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "unigram": unigram,
    "word-pieces": word_pieces,
    "words": words,
    "backwards": backwards,
}


def wrap(tokenizer: Tokenizer, template: Any = None, **more: Any) -> Any:
    """transformers' form of a tokenizer."""
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **tokens, **more
    )


def save(folder: Path, tokenizer: Tokenizer, template: Any = None, **more: Any) -> None:
    """The files of a tokenizer, as transformers saves them."""
    wrap(tokenizer, template, **more).save_pretrained(folder)


def runtime_form(
    plain: Any, folder: Path, templates: Mapping[str, str] | None = None
) -> RuntimeTokenizer:
    """The runtime's form of a tokenizer of transformers."""
    plain.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    content = (folder / "tokenizer.json").read_bytes()
    return RuntimeTokenizer(content, config, ChatTemplates(templates or {}, special_tokens(config)))


def _letters() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = ["hello world, the adapters of a batch"] * 4
    trainer = trainers.BpeTrainer(vocab_size=60, **_shown())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator(_TEXTS, trainer)


def _shown() -> dict[str, Any]:
    return {"special_tokens": [*SPECIAL, *TURNS], "show_progress": False}
