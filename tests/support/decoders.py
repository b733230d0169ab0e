"""Tiny random decoders of every family that generates."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loraexport.bases.decoder import load_decoder_graph
from loraexport.hf.quiet import quiet_models
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import normalise_providers
from loraexport_runtime.generation.engine import GenerationEngine
from loraexport_runtime.generation.steps.runner import Runner
from support.builds import Project

CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
VOCABULARY, CONTEXT = 320, 128
PAD, BOS, EOS = 0, 1, 2
ADAPTERS = ("first", "second")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_SITES = (["q_proj", "v_proj"], ["k_proj", "o_proj", "down_proj"])


@dataclass(frozen=True)
class Family:
    """A tiny decoder of a family, and where its two adapters apply."""

    config: Callable[[], Any]
    sites: tuple[list[str], list[str]] = _SITES
    """target_modules of the first adapter (rank 4) and of the second (rank 8, rsLoRA)."""
    notes: str = ""
    lengths: tuple[int, ...] = ()
    """Across which a build proves it: windows, and the length of longrope's first factors."""


WINDOW = 8
"""Of the families that have one; a test's prompts and what follows them are longer."""
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + index for index in range(8)],
    "original_max_position_embeddings": 12,
}
_FUSED = (["qkv_proj", "down_proj"], ["gate_up_proj", "o_proj"])

FAMILIES: dict[str, Family] = {
    "Llama": Family(
        lambda: tf.LlamaConfig(**SIZES),
        (["q_proj", "v_proj"], ["k_proj", "o_proj", "gate_proj", "down_proj"]),
    ),
    "Mistral": Family(
        lambda: tf.MistralConfig(**SIZES, sliding_window=WINDOW),
        notes="a window in every layer",
        lengths=(WINDOW,),
    ),
    "Qwen2": Family(
        lambda: tf.Qwen2Config(**SIZES),
        (["q_proj", "v_proj"], ["k_proj", "up_proj", "lm_head"]),
        "biases of q, k and v; `lm_head` as a site",
    ),
    "Qwen2 with windows": Family(
        lambda: tf.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
        ),
        notes="a window in the layers from `max_window_layers` on",
        lengths=(WINDOW,),
    ),
    "Qwen3": Family(lambda: tf.Qwen3Config(**SIZES, head_dim=16), notes="norms of q and k"),
    "Gemma": Family(lambda: tf.GemmaConfig(**SIZES, head_dim=16), notes="tied embeddings"),
    "Gemma 2": Family(
        # Its norms behind every block keep what that adds small beside larger embeddings.
        lambda: tf.Gemma2Config(
            **{**SIZES, "initializer_range": 0.05},
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
        ),
        notes="a window in every other layer; softcaps of attention and logits",
        lengths=(WINDOW,),
    ),
    "Phi-3": Family(
        lambda: tf.Phi3Config(
            **SIZES, original_max_position_embeddings=CONTEXT, sliding_window=WINDOW
        ),
        _FUSED,
        "fused `qkv_proj` and `gate_up_proj`; a window in every layer",
        (WINDOW,),
    ),
    "Phi-3.5": Family(
        lambda: tf.Phi3Config(
            **SIZES, original_max_position_embeddings=12, rope_parameters=dict(LONGROPE)
        ),
        _FUSED,
        "longrope: each row its own factors; a row that outgrows the first ones is read again",
        (12,),
    ),
    "Phi-2": Family(
        lambda: tf.PhiConfig(
            **{**SIZES, "hidden_size": 128, "initializer_range": 0.1}, partial_rotary_factor=0.5
        ),
        (["q_proj", "v_proj", "fc1"], ["k_proj", "dense", "fc2"]),
        "attention and MLP side by side: q, k, v and `fc1` of one input; RoPE in half of each head",
    ),
    "SmolLM3": Family(
        lambda: tf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0]), notes="a layer without RoPE"
    ),
    "Granite": Family(
        lambda: tf.GraniteConfig(
            **SIZES,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            attention_multiplier=0.3,
        ),
        notes="its four multipliers",
    ),
}


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world the adapters of a batch"] * 3, trainer)
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def write_base(folder: Path, family: Family) -> None:
    """A base with random weights and biases, and a tokenizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(family.config()).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")


def write_decoder(folder: Path, family: Family, **changes: Any) -> Path:
    """A base, two adapters with random A and B, and a spec; its path."""
    write_base(folder, family)
    for index, name in enumerate(ADAPTERS):
        lora = LoraConfig(
            r=(4, 8)[index],
            lora_alpha=8,
            use_rslora=index == 1,
            target_modules=family.sites[index],
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(1 + index)
        with quiet_models():
            wrapped: Any = get_peft_model(load_base(folder), lora)
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        with quiet_models():
            wrapped.save_pretrained(folder / name, save_embedding_layers=False)
    data = {
        "base": {"kind": "causal_lm", "path": "base"},
        "adapters": [{"name": name, "path": name} for name in ADAPTERS],
    }
    return Project(folder).spec(**(data | changes))


def write_family(folder: Path, name: str, **changes: Any) -> Path:
    """The same, of a family by its name."""
    return write_decoder(folder, FAMILIES[name], **changes)


def write_genai(folder: Path) -> None:
    """A folder as onnxruntime-genai's model builder makes it, two adapters, and a spec of both."""
    spec = write_decoder(folder, FAMILIES["Llama"])
    graph = load_decoder_graph(make_plan(read_spec(spec), folder))
    graph.write_files(folder / "genai")
    ir.save(graph.model, folder / "genai/model.onnx", external_data="model.onnx.data")
    adapters = [{"name": name, "path": name} for name in ADAPTERS]
    Project(folder).spec(base={"kind": "onnx", "path": "genai"}, adapters=adapters)


def load_base(folder: Path) -> Any:
    """The plain model of a project."""
    return tf.AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


class Peft:
    """transformers and PEFT: one prompt at a time, unpadded, one adapter."""

    def __init__(self, folder: Path) -> None:
        with quiet_models():
            model: Any = PeftModel.from_pretrained(
                load_base(folder), folder / ADAPTERS[0], ADAPTERS[0]
            )
            model.load_adapter(folder / ADAPTERS[1], ADAPTERS[1])
        self._model = model.eval()

    def generate(
        self, prompt: Sequence[int], adapter: str | None, steps: int, **more: Any
    ) -> tuple[int, ...]:
        """The likeliest tokens, without the end-of-text token; `more`: for transformers."""
        ids = torch.tensor([list(prompt)])
        options: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": steps,
            "do_sample": False,
            **more,
        }
        with torch.no_grad(), quiet_models():
            if adapter is None:
                with self._model.disable_adapter():
                    found = self._model.generate(**options)
            else:
                self._model.set_adapter(adapter)
                found = self._model.generate(**options)
        tokens = found[0, len(prompt) :].tolist()
        return tuple(tokens[: tokens.index(EOS)] if EOS in tokens else tokens)


def write_tenants(folder: Path, **changes: Any) -> Path:
    """A tiny Llama of two slots that carries two adapters, and four more beside it, `more-0` to
    `more-3`; the spec's path."""
    spec = write_family(folder, "Llama", slots=2, max_rank=8, **changes)
    for index in range(4):
        source, more = folder / ADAPTERS[index % 2], folder / f"more-{index}"
        shutil.copytree(source, more)
        tensors = load_file(more / "adapter_model.safetensors")
        random = np.random.default_rng(100 + index)
        drawn = {
            name: (0.3 * random.standard_normal(value.shape)).astype(value.dtype)
            for name, value in sorted(tensors.items())
        }
        save_file(drawn, more / "adapter_model.safetensors", {"format": "pt"})
    return spec


def make_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engines that are opened on a CPU work as on a device, but for captures."""
    make = Runner.__init__

    def remote(runner: Runner, *arguments: Any, **options: Any) -> None:
        make(runner, *arguments, **options)
        runner.is_remote = True

    monkeypatch.setattr(Runner, "__init__", remote)


def open_engine(artifact: Path, provider: str = "cpu", **options: Any) -> GenerationEngine:
    """`options`: see GenerationEngine."""
    manifest = Manifest.read(artifact)
    assert isinstance(manifest.kind, Decoder)
    return GenerationEngine(
        artifact, manifest, manifest.kind, normalise_providers([provider]), **options
    )
