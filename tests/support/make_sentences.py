"""sentence-transformers' own folders and what its encode() and predict() give, for tests/hf/saved.

Run it with sentence-transformers 6.2 installed: `python tests/support/make_sentences.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

FOLDER = Path(__file__).resolve().parents[1] / "hf/saved"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(16))]
TEXTS = ("w0 w5 w5 w9", "w3", "w15 w2 w7 w8 w1 w1 w4", "w11 w6")
PROMPT = "w10 w12 "
_TINY: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}


def write_base(folder: Path, decoder: bool, labels: int = 0) -> str:
    """A tiny model with a tokenizer of words; a decoder's ends each text and pads on the left."""
    torch.manual_seed(0)
    kinds: Any = (tf.Qwen3Config, tf.Qwen3Model) if decoder else (tf.BertConfig, tf.BertModel)
    sizes = {"num_key_value_heads": 1, "head_dim": 4} if decoder else {}
    model_class = tf.BertForSequenceClassification if labels else kinds[1]
    config = kinds[0](**_TINY, **sizes, **({"num_labels": labels} if labels else {}))
    model_class(config).save_pretrained(folder)
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A [SEP]" if decoder else "[CLS] $A [SEP]"
    pair = f"{single} $B:1 [SEP]:1"
    specials = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, specials)
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side="left" if decoder else "right",
        model_max_length=16,
    )
    fast.save_pretrained(folder)
    return str(folder)


def write_encoder(
    name: str, work: Path, steps: Sequence[Any], decoder: bool, **options: Any
) -> None:
    """Save a model of these modules behind the transformer, and what it encodes."""
    for step in steps:
        for parameter in step.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    modules = [st.Transformer(write_base(work / name, decoder)), *steps]
    model = SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(FOLDER / name), create_model_card=False)
    expected = []
    for prompt in ("", PROMPT):
        features = model.preprocess(list(TEXTS), prompt=prompt or None)
        length = int(features.get("prompt_length") or 0)
        vectors = model.encode(list(TEXTS), prompt=prompt)
        expected.append(_case(features, np.asarray(vectors), length))
    _write_expected(name, expected)


def write_reranker(name: str, work: Path) -> None:
    """Save a CrossEncoder, and its scores of pairs."""
    model = CrossEncoder(write_base(work / name, False, labels=1), device="cpu")
    model.save(str(FOLDER / name), create_model_card=False)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    features = model.preprocess(pairs)
    scores = np.asarray(model.predict(pairs))[:, None]
    _write_expected(name, [_case(features, scores, 0)])


def _case(features: Any, y: np.ndarray, prompt_length: int) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {key: features[key].tolist() for key in names if key in features}
    return {"inputs": inputs, "prompt_length": prompt_length, "y": y.tolist()}


def _write_expected(name: str, cases: list[dict[str, Any]]) -> None:
    (FOLDER / name / "expected.json").write_text(json.dumps(cases) + "\n")


def write_all(work: Path) -> None:
    """Every folder of tests/hf/saved; `work` is for files on the way."""
    torch.manual_seed(1)
    dense = st.Dense(16, 6, activation_function=torch.nn.GELU(), use_residual=True)
    chain = [st.Pooling(8, ("cls", "mean")), dense, st.LayerNorm(6), st.Dropout(0.3)]
    chain += [st.Normalize()]
    prompts = {"query": PROMPT, "document": ""}
    write_encoder("chain", work, chain, False, truncate_dim=4, prompts=prompts)
    without = st.Pooling(8, ("weightedmean", "max", "cls", "lasttoken"), include_prompt=False)
    write_encoder("without-prompt", work, [without], False, prompts=prompts)
    last = [st.Pooling(8, "lasttoken"), st.Normalize()]
    write_encoder("last-token", work, last, True, prompts=prompts, default_prompt_name="query")
    several = st.Pooling(8, ("mean_sqrt_len_tokens", "weightedmean", "mean", "max", "cls"))
    write_encoder("left", work, [several], True)
    write_reranker("reranker", work)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as work_folder:
        write_all(Path(work_folder))
