"""The float64 reference: the whole model's numbers, with the memory of one layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from support.decoders import FAMILIES, SIZES, make_prompts
from transformers import DynamicCache

from loraexport.hf.model import load_stored_decoder
from loraexport.parity.decoder import streamed
from loraexport.parity.decoder.reference import Text, parts_read
from loraexport.parity.decoder.sources import PlainDecoder
from loraexport.parity.decoder.streamed import Reading, StreamedDecoder
from loraexport.parity.model.plain_model import merged_into
from loraexport.parity.oracle import ReferenceAdapter
from loraexport_runtime.checking.model import BASE, only

NAMES = ("Mistral", "Gemma 2", "Phi-3.5", "Phi-2", "Qwen2", "Granite")


def save(folder: Path, config: Any, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    model: Any = tf.AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(folder)
    return folder


def adapter(model: Any, *ends: str) -> ReferenceAdapter:
    """A random one for the linear layers whose names end so."""
    random = np.random.default_rng(3)
    sites = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(ends):
            a = random.standard_normal((3, module.in_features))
            sites[name] = a, random.standard_normal((module.out_features, 3)) * 0.1, 0.5
    return ReferenceAdapter(sites, {}, {})


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter at the output layer too, whose rows come in blocks; stored as bfloat16."""
    monkeypatch.setattr(streamed, "_BLOCK", 100)
    base = save(tmp_path, FAMILIES[name].config(), torch.bfloat16)
    whole: Any = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().double()
    adapters = {1: adapter(whole, "q_proj", "qkv_proj", "fc2", "down_proj", "lm_head")}
    decoder = StreamedDecoder(load_stored_decoder(base), adapters)
    texts = make_prompts(9, 20, 4)
    mixes = [only(1), BASE, only(1)]
    readings = [Reading(mix, text, 3) for mix, text in zip(mixes, texts, strict=True)]
    for text, mix, logits in zip(texts, mixes, decoder.run(readings), strict=True):
        with torch.no_grad(), merged_into(whole, adapters, mix):
            wanted = whole(input_ids=torch.tensor([text])).logits[0, -3:].numpy()
        assert logits.dtype == np.float64
        # Norms and RoPE are float32 in transformers itself.
        assert np.abs(logits - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_a_text_goes_on_from_its_cache(tmp_path: Path) -> None:
    base = save(tmp_path, FAMILIES["Mistral"].config(), torch.float32)
    decoder = StreamedDecoder(load_stored_decoder(base), {})
    (text,) = make_prompts(20)
    cache = DynamicCache(config=decoder.config)
    parts = [text[:11], text[11:12], text[12:13]]
    for end, part in zip((11, 12, 13), parts, strict=True):
        (logits,) = decoder.run([Reading(BASE, part, 1, cache)])
        (wanted,) = decoder.run([Reading(BASE, text[:end], 1)])
        assert np.abs(logits - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_one_layer_at_a_time_is_float64(tmp_path: Path) -> None:
    base = save(tmp_path, tf.LlamaConfig(**{**SIZES, "num_hidden_layers": 4}), torch.bfloat16)
    model: Any = load_stored_decoder(base)
    widest = 0

    def look(*_: Any) -> None:
        nonlocal widest
        wide = [p for p in model.parameters() if p.dtype == torch.float64 and p.ndim == 2]
        widest = max(widest, sum(parameter.numel() for parameter in wide))

    layers = list(model.model.layers)
    for layer in layers:
        layer.register_forward_hook(look)
    StreamedDecoder(model, {}).run([Reading(BASE, text, 1) for text in make_prompts(5, 9)])
    assert widest == sum(p.numel() for p in layers[0].parameters() if p.ndim == 2)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.ndim == 2)


def test_buffers_are_not_of_the_checkpoints_dtype(tmp_path: Path) -> None:
    """Gemma 2 scales its embeddings by sqrt(64 * 3): bfloat16 has no such number."""
    config = tf.Gemma2Config(**{**SIZES, "hidden_size": 192}, head_dim=16, query_pre_attn_scalar=16)
    base = save(tmp_path, config, torch.bfloat16)
    model: Any = load_stored_decoder(base)
    scale = model.model.embed_tokens.embed_scale
    assert float(scale) == pytest.approx(192**0.5, rel=1e-6)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_greedy_rereads_where_the_factors_change(tmp_path: Path) -> None:
    """Each token is the likeliest after the whole text so far, read at once."""
    base = save(tmp_path, FAMILIES["Phi-3.5"].config(), torch.float32)
    decoder = PlainDecoder(base, {}, 12)
    texts = [Text(BASE, tuple(prompt)) for prompt in make_prompts(8, 3, 12, 15)]
    greedy = decoder.greedy(texts)
    whole: Any = tf.AutoModelForCausalLM.from_pretrained(base).eval().double()
    for text, (tokens, logits) in zip(texts, greedy, strict=True):
        for step, token in enumerate(tokens.tolist()):
            read = torch.tensor([[*text.prompt, *tokens[:step].tolist()]])
            with torch.no_grad():
                wanted = whole(input_ids=read).logits[0, -1].numpy()
            assert np.abs(logits[step] - wanted).max() < 1e-6 * np.abs(wanted).max()
            assert token == int(wanted.argmax())
    again = decoder.logits(texts, [tokens for tokens, _ in greedy])
    for values, (_, logits) in zip(again, greedy, strict=True):
        assert np.abs(values - logits).max() < 1e-6 * np.abs(logits).max()


def test_readings_of_a_prompt() -> None:
    assert parts_read(20, None) == parts_read(20, 12) == parts_read(5, 12) == [(8, 8)]
    assert parts_read(6, 12) == [(7, 7), (8, 1)]
    assert parts_read(12, 12) == [(1, 1), (8, 7)]
