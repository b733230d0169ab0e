"""Bases, adapters and builds that show every feature of PEFT, and what PEFT itself gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers as tf
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import loraexport_runtime
from loraexport.hf.quiet import quiet_models
from loraexport_runtime import (
    ModelSession,
)
from support.home import Home

ROOT = Path(__file__).resolve().parents[2]
IMPLEMENTATIONS = ("eager", "peft", "torchscript-cpu", "onnx-cpu", "onnx-cpu-plain")
MISSING_LABEL = np.finfo(np.float32).min
PEFTS_WORST = 1e-4
LENGTHS = (7, 12, 5, 9)

_SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_LABELS: dict[str, Any] = {"num_labels": 3}


@dataclass(frozen=True)
class Base:
    """A tiny model: the class whose adapters are trained, and the one that is saved."""

    config: Any
    trained: Any
    saved: Any
    task: str
    pad: int = 0


BASES = {
    "bert": Base(
        tf.BertConfig(**_SIZES, **_LABELS),
        tf.BertForSequenceClassification,
        tf.BertForSequenceClassification,
        "sequence-classification",
    ),
    # Its checkpoint has no classifier: every adapter brings one.
    "roberta": Base(
        tf.RobertaConfig(**_SIZES, type_vocab_size=1, pad_token_id=1),
        tf.RobertaForSequenceClassification,
        tf.RobertaModel,
        "sequence-classification",
        pad=1,
    ),
    # Adapters of GPT2LMHeadModel; the artifacts are of the bare model.
    "gpt2": Base(
        tf.GPT2Config(
            vocab_size=60,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        ),
        tf.GPT2LMHeadModel,
        tf.GPT2LMHeadModel,
        "feature-extraction",
    ),
    # Biases in attention, none in its MLP nor in its head.
    "llama": Base(
        tf.LlamaConfig(
            **_SIZES,
            num_key_value_heads=2,
            attention_bias=True,
            **_LABELS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        tf.LlamaForSequenceClassification,
        tf.LlamaForSequenceClassification,
        "sequence-classification",
    ),
    # Its lm_head is its embedding.
    "tied": Base(
        tf.LlamaConfig(
            **_SIZES,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        tf.LlamaForCausalLM,
        tf.LlamaForCausalLM,
        "causal-lm",
    ),
}


def lora(*target_modules: str, labels: int | None = None, **config: Any) -> dict[str, Any]:
    """What LoraConfig gets, and how many labels the model is trained for."""
    targets = {"target_modules": list(target_modules)} if target_modules else {}
    return {"r": 2, "lora_alpha": 4, "labels": labels, **targets, **config}


HEAD: dict[str, Any] = {"task_type": "SEQ_CLS"}  # PEFT then trains the classifier whole
ADAPTERS: dict[str, dict[str, Any]] = {
    "bert/plain": lora("query", "value"),
    "bert/rslora": lora(
        target_modules=r".*\.layer\.\d\.(attention\.self\.key|intermediate\.dense)",
        r=3,
        use_rslora=True,
    ),
    "bert/patterns": lora(
        target_modules="all-linear",
        exclude_modules=["pooler.dense", "value", "classifier"],
        rank_pattern={"query": 3, r"layer\.1\.output\.dense": 1},
        alpha_pattern={"key": 9},
    ),
    "bert/layers": lora("query", "dense", layers_to_transform=[1], layers_pattern="layer"),
    "bert/lora_bias": lora("key", "value", lora_bias=True),
    "bert/lora_only": lora("key", "value", bias="lora_only"),
    "bert/head": lora("query", **HEAD),
    "bert/wide_head": lora("query", labels=5, **HEAD),
    "bert/other_head": lora("value", **HEAD),
    "bert/embedding": lora("word_embeddings", "query"),
    "bert/dora": lora("query", "dense", use_dora=True, exclude_modules=["pooler.dense"]),
    "bert/dora_embedding": lora("word_embeddings", "key", use_dora=True),
    "bert/dora_head": lora("classifier", "key", use_dora=True),
    "bert/saved_norm": lora("query", modules_to_save=["LayerNorm"]),
    "bert/saved_embedding": lora("query", modules_to_save=["word_embeddings"]),
    "roberta/head": lora("query", **HEAD),
    "roberta/wide_head": lora("query", "value", labels=7, use_rslora=True, **HEAD),
    "roberta/dora": lora("query", use_dora=True, **HEAD),
    "roberta/lora_bias": lora("value", lora_bias=True, **HEAD),
    "roberta/plain": lora("value"),
    "gpt2/plain": lora("mlp.c_proj", fan_in_fan_out=True),
    "gpt2/conv1d": lora("c_attn", "c_fc", fan_in_fan_out=True),
    "gpt2/conv1d_dora": lora(
        "c_attn", "c_fc", fan_in_fan_out=True, use_dora=True, bias="lora_only"
    ),
    "gpt2/lora_only": lora("c_attn", fan_in_fan_out=True, bias="lora_only"),
    "gpt2/embedding": lora("c_attn", "wte", fan_in_fan_out=True),
    "gpt2/head": lora("c_attn", fan_in_fan_out=True, modules_to_save=["lm_head"]),
    "gpt2/saved_conv1d": lora("c_attn", fan_in_fan_out=True, modules_to_save=["attn.c_proj"]),
    "llama/plain": lora("q_proj"),
    "llama/dora": lora("v_proj", "down_proj", "embed_tokens", use_dora=True),
    "llama/lora_bias": lora("v_proj", "down_proj", lora_bias=True),
    "llama/lora_only": lora("q_proj", "v_proj", bias="lora_only"),
    "llama/head": lora("q_proj", **HEAD),
    "llama/wide_head": lora("q_proj", labels=5, **HEAD),
    "llama/narrow_head": lora("q_proj", labels=2, **HEAD),
    "tied/plain": lora("v_proj"),
    "tied/lora_bias": lora("q_proj", "down_proj", lora_bias=True),
    "tied/dora_embedding": lora("q_proj", "embed_tokens", use_dora=True),
    "tied/dora_head": lora("k_proj", "lm_head", use_dora=True),
    "tied/head": lora("q_proj", modules_to_save=["lm_head"]),
}
UNMERGED = {"llama/lora_bias", *(key for key in ADAPTERS if key.startswith("tied/"))}
"""PEFT merges no lora_bias into a layer without a bias, and merging changes both tied weights."""


def of(base: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{base}/{name}" for name in names)


BERT = of("bert", "plain", "rslora", "patterns", "layers", "lora_bias", "lora_only", "head")
BERT += of("bert", "other_head", "wide_head", "embedding", "dora", "dora_embedding")
GPT2 = of("gpt2", "plain", "conv1d", "conv1d_dora", "lora_only", "embedding")
TIED = of("tied", "plain", "lora_bias", "dora_embedding", "dora_head", "head")
ROBERTA = of("roberta", "head", "wide_head")
BLENDED = of("bert", "plain", "lora_bias", "lora_only", "head", "embedding", "dora")
BLENDED += of("bert", "dora_embedding", "dora_head")

BOTH: dict[str, Any] = {"formats": ["torchscript", "onnx"]}
BUILDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "bert": (BERT, {"export": BOTH}),
    "gpt2": (GPT2, {"export": BOTH}),
    "roberta": (ROBERTA, {"export": BOTH}),
    "tied": (TIED, {"export": BOTH}),
    "blend": (BLENDED, {"slots": 9, "export": BOTH | {"blend": True}}),
    # One slot, a plain adapter, and room for all that later ones may bring.
    "llama": (
        of("llama", "plain"),
        {
            "slots": 1,
            "sites": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
            "features": ["dora", "bias", "heads"],
            "export": {"formats": ["onnx"]},
        },
    ),
}
"""The artifacts: their adapters, and what else their specs say."""


@dataclass(frozen=True)
class Feature:
    """A row of the docs' table, and what proves it."""

    name: str
    peft: str
    """What PEFT's own mixed batch (`adapter_names`) gives: `yes`, an error or wrong numbers."""
    note: str
    proof: tuple[str, ...] = ()
    """Adapters in a mixed batch; of a refused feature none."""
    refused: dict[str, Any] = field(default_factory=dict)
    """Fields of a config, and values that are refused."""

    @property
    def in_batch(self) -> str:
        return "yes" if self.proof else "refused"


FEATURES = (
    Feature(
        "`target_modules`: a list, a regular expression, `all-linear`",
        "yes",
        "the tensors say where",
        of("bert", "plain", "rslora", "patterns"),
    ),
    Feature(
        "`exclude_modules`, `layers_to_transform`, `layers_pattern`",
        "yes",
        "the tensors say where",
        of("bert", "patterns", "layers"),
    ),
    Feature("`use_rslora`", "yes", "", of("bert", "rslora")),
    Feature(
        "`rank_pattern`, `alpha_pattern`", "yes", "the first match counts", of("bert", "patterns")
    ),
    Feature("`fan_in_fan_out` (Conv1D)", "yes", "", of("gpt2", "conv1d")),
    Feature(
        "embedding LoRA",
        "yes",
        "a tied `lm_head` stays; the embedding that PEFT saves beside it has to be the base's",
        of("bert", "embedding") + of("gpt2", "embedding"),
    ),
    Feature(
        "`lora_bias`",
        "yes",
        "layers without a bias too",
        of("bert", "lora_bias") + of("tied", "lora_bias"),
    ),
    Feature(
        "`bias: lora_only`",
        "wrong numbers",
        "each row has its own biases; PEFT writes them into the base",
        of("bert", "lora_only") + of("gpt2", "lora_only"),
    ),
    Feature(
        "DoRA: linear, Conv1D, embedding",
        "error",
        "a hot load needs `base=`, the model's directory",
        of("bert", "dora", "dora_embedding")
        + of("gpt2", "conv1d_dora")
        + of("tied", "dora_embedding", "dora_head"),
    ),
    Feature(
        "`modules_to_save`: a head of one layer",
        "if every adapter has one",
        "rows without one have the base's",
        of("bert", "head", "other_head") + of("tied", "head"),
    ),
    Feature(
        "heads of different width",
        "error",
        "as wide as the widest, the lowest number for the labels that a head lacks; then no LoRA on"
        " the head",
        of("bert", "wide_head"),
    ),
    Feature(
        "heads of several layers, base without a head",
        "error",
        "every row names an adapter then",
        ROBERTA,
    ),
    Feature("adapters on different sites", "yes", "", of("bert", "plain", "layers")),
    Feature("all of these in one batch", "error", "", BERT),
    Feature(
        "adapters of `…ForCausalLM` on the bare model",
        "wrong numbers",
        "names are matched through the prefix",
        of("gpt2", "conv1d", "embedding"),
    ),
    Feature(
        "`bias: all`",
        "–",
        "it trains the bias of every module, of LayerNorms too",
        refused={"bias": "all"},
    ),
    Feature(
        "`modules_to_save`: other than `torch.nn.Linear`",
        "–",
        "LayerNorm, an embedding, Conv1D: only linear layers can differ by row",
        refused={"modules_to_save": ["LayerNorm"]},
    ),
    Feature(
        "PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ (`init_lora_weights`)",
        "–",
        "they change the base itself; PEFT converts them on save, all but LoftQ",
        refused={"init_lora_weights": ["pissa", "olora", "corda", "lora_ga", "loftq"]},
    ),
    Feature(
        "`trainable_token_indices`",
        "–",
        "single token embeddings were trained",
        refused={"trainable_token_indices": [3]},
    ),
    Feature(
        "`target_parameters`",
        "–",
        "LoRA sits on bare parameters, such as those of experts",
        refused={"target_parameters": ["experts.down_proj"]},
    ),
    Feature(
        "`layer_replication`",
        "–",
        "the base's layers are repeated",
        refused={"layer_replication": [[0, 2], [1, 2]]},
    ),
    Feature(
        "aLoRA (`alora_invocation_tokens`)",
        "–",
        "it acts after given tokens only",
        refused={"alora_invocation_tokens": [5]},
    ),
    Feature(
        "`ensure_weight_tying`",
        "–",
        "one adapter serves two tied modules",
        refused={"ensure_weight_tying": True},
    ),
    Feature(
        "QALoRA, BD-LoRA, KaSA, MonteCLoRA",
        "–",
        "other mathematics than W + s B A",
        refused={
            "use_qalora": True,
            "use_bdlora": {"target_modules_bd_a": ["query"]},
            "kasa_config": {"beta": 0.1},
            "monteclora_config": {"num_samples": 4},
        },
    ),
    Feature(
        "Arrow (`arrow_config`), Megatron (`megatron_config`)",
        "–",
        "they route or shard at run time",
        refused={"arrow_config": {"top_k": 2}, "megatron_config": {"tp_size": 2}},
    ),
)
PROVEN = tuple(dict.fromkeys(key for feature in FEATURES for key in feature.proof))


class World:
    """The models, adapters and artifacts of this file, each made when first asked for."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.root = home.root / "peft"
        self._sessions: dict[str, ModelSession] = {}
        self._merged: dict[Any, Any] = {}

    def base(self, name: str) -> Path:
        def save(folder: Path) -> None:
            torch.manual_seed(0)
            BASES[name].saved(BASES[name].config).save_pretrained(folder)

        return self._home.once(f"peft/{name}/base", save)

    def adapter(self, key: str) -> Path:
        """A PEFT directory in which no tensor is zero."""
        config = dict(ADAPTERS[key])
        del config["labels"]

        def save(folder: Path) -> None:
            with quiet_models():
                wrapped = get_peft_model(self.load(key), LoraConfig(**config))
                _randomise(wrapped, list(ADAPTERS).index(key))
                wrapped.save_pretrained(str(folder))

        return self._home.once(f"peft/{key}", save)

    def load(self, key: str) -> Any:
        """The plain model that an adapter was trained on; `bert/` alone is the base."""
        name = key.split("/")[0]
        labels = ADAPTERS[key]["labels"] if key in ADAPTERS else None
        sizes = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}
        with quiet_models():
            return BASES[name].trained.from_pretrained(self.base(name), **sizes).eval()

    def merged(self, key: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Any:
        """The plain model with the adapter merged in by PEFT, or beside it where it cannot be."""
        asked = (key, dtype, scale)
        if asked not in self._merged:
            model = self.load(key).to(dtype)
            if key in ADAPTERS:
                with quiet_models():
                    model = PeftModel.from_pretrained(model, str(self.adapter(key))).eval()
                for module in model.modules():
                    if isinstance(module, LoraLayer):
                        module.scaling["default"] *= scale
                if key not in UNMERGED:
                    with quiet_models():
                        model = model.merge_and_unload()
            self._merged[asked] = model
        return self._merged[asked]

    def spec(self, name: str, base: str, adapters: Sequence[str], **changes: Any) -> Path:
        task = changes.pop("task", BASES[base].task)
        folder = changes.pop("folder", self.root)
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "version": 1,
            "name": name,
            "base": {"kind": "transformers", "path": str(self.base(base)), "task": task},
            "adapters": [
                {"name": key.split("/")[1], "path": str(self.adapter(key))} for key in adapters
            ],
            **changes,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    def artifact(self, name: str) -> Path:
        adapters, changes = BUILDS[name]
        base = adapters[0].split("/")[0]
        folder = self._home.once(
            f"peft/specs/{name}",
            lambda folder: self.spec(name, base, adapters, folder=folder, **changes),
        )
        return self._home.build(folder / f"{name}.yaml")

    def open(self, name: str) -> ModelSession:
        """A session of its own."""
        session = loraexport_runtime.load(self.artifact(name), threads=1)
        assert isinstance(session, ModelSession)
        return session

    def session(self, name: str) -> ModelSession:
        """The session that tests share, and leave as it is."""
        if name not in self._sessions:
            self._sessions[name] = self.open(name)
        return self._sessions[name]


def _randomise(model: Any, seed: int) -> None:
    """Random values for whatever PEFT trains; magnitudes stay near what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


Inputs = dict[str, np.ndarray]


def make_inputs(session: ModelSession, base: str, lengths: Sequence[int] = LENGTHS) -> Inputs:
    """Random ids, padded on the right."""
    generator = np.random.default_rng(5)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, generator.integers(3, 60, mask.shape), BASES[base].pad)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {entry.name: values[entry.name] for entry in session.model.inputs}


def run(session: ModelSession, inputs: Inputs, adapters: Sequence[Any]) -> np.ndarray:
    y: np.ndarray = session.run(inputs, adapters)[session.model.outputs[0].name]
    return y


def run_plain(model: Any, inputs: Inputs, **arguments: Any) -> np.ndarray:
    """Logits of a classifier, the hidden states of a GPT-2."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    gpt2 = isinstance(getattr(model, "base_model", model).config, tf.GPT2Config)
    with torch.no_grad():
        found = model(**tensors, **arguments, return_dict=True, output_hidden_states=gpt2)
    y: np.ndarray = (found.hidden_states[-1] if gpt2 else found.logits).numpy()
    return y


def error_of(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """The largest error of a row, relatively; labels that its head lacks have to be the lowest."""
    keep: Any = mask == 1 if found.ndim == 2 else ...
    width = expected.shape[-1]
    assert (found[..., width:] == MISSING_LABEL).all(), "labels that the head lacks"
    difference = np.abs(found[..., :width] - expected)[keep]
    return float(difference.max() / np.abs(expected[keep]).max())


def assert_is_peft(
    world: World, session: ModelSession, base: str, adapters: Sequence[str | None]
) -> None:
    """A mixed batch, row by row, against PEFT's merged models; every adapter moves its row."""
    inputs = make_inputs(session, base, [LENGTHS[row % 4] for row in range(len(adapters))])
    found = run(session, inputs, adapters)
    for row, name in enumerate(adapters):
        expected = run_plain(world.merged(f"{base}/{name or ''}"), inputs)[row]
        error = error_of(found[row], expected, inputs["attention_mask"][row])
        assert error < PEFTS_WORST, f"row {row}, adapter {name}: {error}"
        plain = run_plain(world.merged(f"{base}/"), inputs)[row]
        if name is not None and plain.shape == expected.shape:
            moved = np.abs(expected - plain).max() / np.abs(plain).max()
            assert moved > 0.01, f"{name} is too weak to show anything: {moved}"


def plain_onnx(artifact: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(artifact / "graphs/model.onnx", options, ["CPUExecutionProvider"])
