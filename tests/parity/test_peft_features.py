"""PEFT's features on whole models, each held to PEFT: mixed batches, blends, hot loads, refusals.

A feature counts by two proofs: the build's own parity, and the runtime's mixed batch against plain
models into which PEFT has merged one adapter each. The docs' table is `FEATURES`.
"""

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers as tf
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file, save_file

import loraexport_runtime
from loraexport.bases.model import load_model
from loraexport.hf.quiet import quiet_models
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport.tensors import to_torch
from loraexport_runtime import (
    AdapterConfigError,
    AdapterError,
    AdapterWeightsError,
    InputError,
    ModelSession,
    WeightsError,
)
from loraexport_runtime.adapters.config import FIELDS, Refused, read_config

# PEFT says of an embedding LoRA that it saves the embedding too; of lora_bias that it cannot be
# merged into a layer without a bias, and, wrongly, that its tensors are shards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning"),
]

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

BUILDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "bert": (BERT, {}),
    "gpt2": (GPT2, {}),
    "roberta": (ROBERTA, {}),
    "tied": (TIED, {}),
    "blend": (BLENDED, {"slots": 9, "export": {"blend": True}}),
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
    """The models, adapters and artifacts of this file, each made when first asked for.

    Two workers of pytest-xdist share them: who comes second waits for the first.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sessions: dict[str, ModelSession] = {}
        self._merged: dict[Any, Any] = {}

    def base(self, name: str) -> Path:
        with self._once(name + "/base") as path:
            if path is not None:
                torch.manual_seed(0)
                BASES[name].saved(BASES[name].config).save_pretrained(path)
        return self.root / name / "base"

    def adapter(self, key: str) -> Path:
        """A PEFT directory in which no tensor is zero."""
        name, config = key.split("/")[0], dict(ADAPTERS[key])
        self.base(name)
        with self._once(key) as path:
            if path is not None:
                with quiet_models():
                    model = self.load(key)
                    del config["labels"]
                    wrapped = get_peft_model(model, LoraConfig(**config))
                    _randomise(wrapped, list(ADAPTERS).index(key))
                    wrapped.save_pretrained(str(path))
        return self.root / key

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
        with self._once(f"artifacts/{name}") as path:
            if path is not None:
                adapters, changes = BUILDS[name]
                base = adapters[0].split("/")[0]
                build(self.spec(name, base, adapters, **changes), path.parent)
        return self.root / "artifacts" / name

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

    @contextmanager
    def _once(self, name: str) -> Iterator[Path | None]:
        """The path to make, or None where it is there."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{name.replace('/', '-')}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield None if path.exists() else path


def _randomise(model: Any, seed: int) -> None:
    """Random values for whatever PEFT trains; magnitudes stay near what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = tmp_path_factory.getbasetemp().parent / "peft-features"
        shared.mkdir(exist_ok=True)
        return World(shared)
    return World(tmp_path_factory.mktemp("peft-features"))


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


# A: every feature of the table


def test_the_docs_list_these_features() -> None:
    text = (ROOT / "docs/reference/peft.md").read_text(encoding="utf-8")
    section = text.split("\n## Support\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    rows = [
        "| feature | in a mixed batch | PEFT's own mixed batch | note |",
        "| --- | --- | --- | --- |",
    ]
    rows += [f"| {one.name} | {one.in_batch} | {one.peft} | {one.note} |" for one in FEATURES]
    assert table == rows, "write this into docs/reference/peft.md:\n" + "\n".join(rows)


def test_the_table_names_every_refused_field() -> None:
    listed = {name for feature in FEATURES for name in feature.refused}
    refused = {name for name, rule in FIELDS.items() if isinstance(rule, Refused)}
    assert listed == refused | {"init_lora_weights", "modules_to_save"}


@pytest.mark.parametrize("key", PROVEN)
def test_a_feature_is_proven_in_a_mixed_batch(world: World, key: str) -> None:
    base, name = key.split("/")
    data = json.loads((world.artifact(base) / "parity/parity.json").read_text())
    assert data["status"] == "passed"
    gains = {row["implementation"]: row["gain"] for row in data["rows"] if row["adapter"] == name}
    assert set(gains) >= set(IMPLEMENTATIONS)  # more where there is a CUDA device
    assert list(gains.values()) == pytest.approx([1] * len(gains), abs=1e-3)

    headless = base == "roberta"
    partners = ["head", "wide_head"] if headless else ["plain", None]
    assert_is_peft(world, world.session(base), base, [name, *partners, name])


def test_all_features_share_one_batch(world: World) -> None:
    for base, keys in (("bert", BERT), ("gpt2", GPT2)):
        names: list[str | None] = [key.split("/")[1] for key in keys]
        assert_is_peft(world, world.session(base), base, [*names, None])


def test_the_adapters_are_where_their_configs_say(world: World) -> None:
    adapters = world.session("bert").list_adapters()
    ranks = {name: adapters[name].ranks for name in ("patterns", "layers", "rslora")}
    assert set(ranks["patterns"].values()) == {1, 2, 3}
    patterns = " ".join(ranks["patterns"])
    assert "key" in patterns
    assert not {"value", "pooler", "classifier"} & set(patterns.replace(".", " ").split())
    assert {site.split(".")[3] for site in ranks["layers"]} == {"1"}
    assert len(ranks["layers"]) == 4
    assert set(ranks["rslora"].values()) == {3}


@pytest.mark.parametrize(
    "feature", [one for one in FEATURES if one.proof], ids=lambda one: one.name
)
def test_what_pefts_own_mixed_batch_gives(world: World, feature: Feature) -> None:
    """One batch of the feature's adapters, a plain one and the base, through `adapter_names`."""
    base = feature.proof[0].split("/")[0]
    keys = [key for key in feature.proof if key.startswith(base)]
    beside = [] if base == "roberta" else [f"{base}/plain"]
    bare = "bare model" in feature.name
    outcome = _pefts_outcome(world, base, list(dict.fromkeys([*beside, *keys])), bare)
    if feature.peft == "if every adapter has one":
        assert outcome == "error"
        outcome = {"yes": feature.peft}.get(_pefts_outcome(world, base, keys, bare), "not even so")
    assert outcome == feature.peft


def _pefts_outcome(world: World, base: str, keys: list[str], bare: bool) -> str:
    model = world.load(f"{base}/")
    names = [key.split("/")[1] for key in keys]
    rows = [*names, *([] if base == "roberta" else ["__base__"])]
    inputs = make_inputs(world.session(base), base, [LENGTHS[row % 4] for row in range(len(rows))])
    try:
        with warnings.catch_warnings(action="ignore"):
            plain = model.transformer if bare else model
            wrapped = PeftModel.from_pretrained(plain, str(world.adapter(keys[0])), names[0])
            for key, name in zip(keys[1:], names[1:], strict=True):
                wrapped.load_adapter(str(world.adapter(key)), name)
            found = run_plain(wrapped.eval(), inputs, adapter_names=rows)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError):
        return "error"
    errors = []
    for row, name in enumerate(rows):
        key = f"{base}/{'' if name == '__base__' else name}"
        expected = run_plain(world.merged(key), inputs)[row]
        errors.append(error_of(found[row], expected, inputs["attention_mask"][row]))
    return "yes" if max(errors) < PEFTS_WORST else "wrong numbers"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key}-{value}")
        for feature in FEATURES
        for key, values in feature.refused.items()
        for value in (values if key == "init_lora_weights" else [values])
        if key != "modules_to_save"
    ],
)
def test_a_refused_field_is_refused_by_name(
    world: World, tmp_path: Path, key: str, value: Any
) -> None:
    plain = json.loads((world.adapter("bert/plain") / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, key: value}))
    with pytest.raises(AdapterConfigError) as caught:
        read_config(tmp_path)
    assert f"{key} = {value!r}" in str(caught.value)
    rule = FIELDS[key]
    if isinstance(rule, Refused):
        assert rule.reason in str(caught.value)


def test_a_row_does_not_depend_on_the_other_rows(world: World) -> None:
    for base, keys in (("bert", BERT), ("gpt2", GPT2), ("roberta", ROBERTA)):
        session = world.session(base)
        inputs = make_inputs(session, base)
        names = [key.split("/")[1] for key in keys]
        mixed = [(names * 4)[index : index + 4] for index in range(0, len(names), 4)]
        for batch in mixed:
            y = run(session, inputs, batch)
            for row, name in enumerate(batch):
                alone = run(session, inputs, [name] * 4)[row]
                assert y[row].tobytes() == alone.tobytes(), f"{base}, row {row}, {name}"


# B: blends


BLENDS: tuple[Any, ...] = (
    {"dora": 0.7, "plain": 0.3},
    {"lora_only": 1.2, "lora_bias": -0.5},
    {"head": 0.4, "dora_head": 0.9},
    {"embedding": -0.6, "dora_embedding": 0.8},
    {key.split("/")[1]: 0.25 for key in BLENDED},
    {"dora": np.float32(2.5)},
    {"plain": 0.0},
    {},
    "head",
    None,
)


def test_a_blend_is_the_base_plus_the_weighted_differences(world: World) -> None:
    """W + sum w_i (W_i - W) over every parameter of the model, W_i as PEFT merges them."""
    session = world.session("blend")
    inputs = make_inputs(session, "bert", [LENGTHS[row % 4] for row in range(len(BLENDS))])
    found = run(session, inputs, BLENDS)
    base = world.merged("bert/", torch.float64)
    model = world.load("bert/").double()
    for row, mix in enumerate(BLENDS):
        weights = mix if isinstance(mix, Mapping) else {} if mix is None else {mix: 1.0}
        model.load_state_dict(_mix_states(world, base.state_dict(), weights))
        expected = run_plain(model, inputs)[row]
        assert error_of(found[row], expected, inputs["attention_mask"][row]) < PEFTS_WORST, mix
    assert np.abs(found[0] - found[9]).max() > 0.05


def _mix_states(
    world: World, base: Mapping[str, torch.Tensor], weights: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    mixed = {name: value.clone() for name, value in base.items()}
    for adapter, weight in weights.items():
        state = world.merged(f"bert/{adapter}", torch.float64).state_dict()
        assert state.keys() == mixed.keys()
        for name, value in state.items():
            if value.is_floating_point():
                mixed[name] += float(weight) * (value - base[name])
    return mixed


def test_a_blended_build_passes_parity(world: World) -> None:
    data = json.loads((world.artifact("blend") / "parity/parity.json").read_text())
    assert data["status"] == "passed"
    blended = {
        row["implementation"]: row["gain"] for row in data["rows"] if row["adapter"] == "blend"
    }
    assert set(blended) >= set(IMPLEMENTATIONS) - {"peft"}
    assert "peft" not in blended
    assert all(gain == pytest.approx(1, abs=1e-3) for gain in blended.values())


def test_a_blend_of_one_whole_adapter_is_that_adapter(world: World) -> None:
    session = world.session("blend")
    inputs = make_inputs(session, "bert")
    names = [key.split("/")[1] for key in BLENDED]
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        named = run(session, inputs, [name, None, name, other])
        blended = run(session, inputs, [{name: 1.0}, {}, {name: 1, other: 0.0}, {other: 1}])
        assert named.tobytes() == blended.tobytes(), name


def test_a_blended_row_does_not_depend_on_the_other_rows(world: World) -> None:
    session = world.session("blend")
    inputs = make_inputs(session, "bert", [LENGTHS[row % 4] for row in range(len(BLENDS))])
    mixed = run(session, inputs, BLENDS)
    for row, mix in enumerate(BLENDS):
        others: list[Any] = ["dora"] * len(BLENDS)
        others[row] = mix
        assert run(session, inputs, others)[row].tobytes() == mixed[row].tobytes(), mix


def test_an_adapter_of_weight_0_that_overflows_does_not_reach_a_row(
    world: World, tmp_path: Path
) -> None:
    """The CPU provider overflows in float32; float16 is the next test."""
    session = world.open("blend")
    inputs = make_inputs(session, "bert", (7, 12, 5, 9, 8, 6))
    rows = [
        {"dora": 0.5, "huge": 0.0},
        {"head": 0.5, "lora_only": 0.5},
        None,
        "dora_embedding",
        {"embedding": 1.5, "huge": 0.0},
        {"dora": 0.5, "huge": 0.25},
    ]
    session.load_adapter("huge", world.adapter("bert/plain"))
    before = run(session, inputs, rows)
    assert np.isfinite(before).all()
    session.load_adapter("huge", _huge(world, tmp_path / "huge", 3e38))
    after = run(session, inputs, rows)
    assert not np.isfinite(after[5]).any(), "the test means to overflow"
    assert after[:5].tobytes() == before[:5].tobytes()


def test_an_adapter_of_weight_0_that_overflows_in_float16_does_not_reach_a_row(
    world: World, tmp_path: Path
) -> None:
    """Of the eager model, whose x A^T is a float16 on the CPU too."""
    export = {"dtype": "float16", "blend": True}
    keys = of("bert", "dora", "lora_only")
    path = world.spec("half", "bert", keys, folder=tmp_path, export=export)
    data = yaml.safe_load(path.read_text())
    data["adapters"].append({"name": "huge", "path": str(_huge(world, tmp_path / "huge", 6e4))})
    path.write_text(yaml.safe_dump(data))
    modules = load_model(make_plan(read_spec(path), path.parent))[1]
    inputs = make_inputs(world.session("bert"), "bert")
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.25], [0, 0, 0], [1, 0, 0]])

    def compute(stacks: Mapping[str, np.ndarray]) -> torch.Tensor:
        ids = torch.zeros(4, dtype=torch.int64)
        with torch.no_grad():
            return modules.module(tensors, ids, [to_torch(one) for one in stacks.values()], weights)

    y = compute(modules.stacks)
    assert not y[1].isfinite().any(), "the test means to overflow"
    stacks = {name: value.copy() for name, value in modules.stacks.items()}
    for layer in modules.layers:
        for stack in layer.stacks:
            if stack.role == "lora_A":
                stacks[stack.name][stack.rows(3)] = 0
    without = compute(stacks)
    assert without.isfinite().all()
    for row in (0, 2, 3):
        assert torch.equal(y[row], without[row])


def _huge(world: World, folder: Path, size: float) -> Path:
    """`bert/plain` with an A that is finite, while x A^T is not."""
    folder.mkdir()
    source = world.adapter("bert/plain")
    tensors = load_file(source / "adapter_model.safetensors")
    for name, value in tensors.items():
        if "lora_A" in name:
            tensors[name] = np.where(value < 0, -size, size).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return folder


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -np.inf, "0.5", None, 1e300])
def test_a_weight_that_is_no_finite_number_is_an_input_error(world: World, weight: Any) -> None:
    session = world.session("blend")
    with pytest.raises(InputError, match=r"adapters\[1\]: weight .* of adapter 'plain'; expected"):
        run(session, make_inputs(session, "bert"), [None, {"plain": weight}, None, None])


def test_a_blend_needs_a_graph_that_blends(world: World) -> None:
    session = world.session("bert")
    with pytest.raises(
        InputError, match=r"adapters\[3\] is a blend, which this graph has no input"
    ):
        run(session, make_inputs(session, "bert"), [None, "plain", "dora", {"plain": 1.0}])
    with pytest.raises(
        InputError, match=r"adapters\[0\] is 3; expected an adapter's name, a blend"
    ):
        run(session, make_inputs(session, "bert"), [3, None, None, None])


def test_a_plain_session_need_not_feed_the_weights(world: World) -> None:
    session = world.session("blend")
    inputs, names = make_inputs(session, "bert"), ["dora", None, "head", "dora_embedding"]
    plain = _plain_onnx(world.artifact("blend"))
    slots = session.adapters
    ids = np.array([slots[name] if name else 0 for name in names])
    feeds = {**inputs, "adapter_ids": ids}
    expected = run(session, inputs, names)
    assert plain.run(None, feeds)[0].tobytes() == expected.tobytes()
    weights = np.zeros((4, 9), np.float32)
    weights[0, slots["head"] - 1] = 0.5
    feeds |= {"adapter_ids": ids * [0, 1, 1, 1], "adapter_weights": weights}
    expected = run(session, inputs, [{"head": 0.5}, *names[1:]])
    assert plain.run(None, feeds)[0].tobytes() == expected.tobytes()


def _plain_onnx(artifact: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(artifact / "graphs/model.onnx", options, ["CPUExecutionProvider"])


# C: adapters that come later


@pytest.mark.parametrize("name", ["dora", "lora_bias", "lora_only", "head", "narrow_head"])
def test_features_of_the_spec_let_a_later_adapter_bring_them(world: World, name: str) -> None:
    """The artifact was built from a plain adapter alone, with features: [dora, bias, heads]."""
    session = world.open("llama")
    session.load_adapter(name, world.adapter(f"llama/{name}"), base=world.base("llama"))
    assert_is_peft(world, session, "llama", [name, None, name])


def test_dora_comes_with_base_and_says_so(world: World, tmp_path: Path) -> None:
    session = world.open("llama")
    path = world.adapter("llama/dora")
    with pytest.raises(AdapterError, match=r"uses DoRA.*: pass base=, the directory of the model"):
        session.load_adapter("dora", path)
    torch.manual_seed(1)
    base = BASES["llama"]
    base.saved(base.config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"none of its \d+ tensors is the weight of site"):
        session.load_adapter("dora", path, base=tmp_path)
    assert session.list_adapters().keys() == {"plain"}
    assert_is_peft(world, session, "llama", ["plain", None])


def test_dora_with_a_scale_is_pefts(world: World) -> None:
    """The scale changes ||W + s B A||, and so the output scale of DoRA."""
    session = world.open("llama")
    session.load_adapter("dora", world.adapter("llama/dora"), scale=0.5, base=world.base("llama"))
    inputs = make_inputs(session, "llama")
    found = run(session, inputs, ["dora", None, None, None])[0]
    expected = run_plain(world.merged("llama/dora", scale=0.5), inputs)[0]
    assert error_of(found, expected, inputs["attention_mask"][0]) < PEFTS_WORST
    unscaled = run_plain(world.merged("llama/dora"), inputs)[0]
    assert np.abs(unscaled - expected).max() > 0.05


def test_adapters_of_different_features_take_turns_in_one_slot(world: World) -> None:
    names = ("dora", "head", "lora_only", "plain", "lora_bias", "narrow_head")
    paged = world.open("llama")
    inputs = make_inputs(paged, "llama")
    alone = {}
    for name in names:
        path, base = world.adapter(f"llama/{name}"), world.base("llama")
        paged.load_adapter(name, path, base=base)
        session = world.open("llama")
        session.load_adapter(name, path, base=base)
        alone[name] = run(session, inputs, [name, None, name, name])
    assert len(paged.adapters) == 1
    for name in (*names, *names[::-1]):
        y = run(paged, inputs, [name, None, name, name])
        assert y.tobytes() == alone[name].tobytes(), name


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("roberta/dora", "uses DoRA, for which this artifact has no place; add dora to features"),
        (
            "roberta/lora_bias",
            "brings a bias, for which this artifact has no place; add bias to fe",
        ),
        ("gpt2/head", r"brings 'lm_head', trained whole .*, add features: \[heads\] to the spec"),
        ("llama/wide_head", "needs a build with an adapter whose head is as wide"),
        (
            "roberta/plain",
            r"brings no 'classifier.*', and the base has none .*modules_to_save=\['c",
        ),
    ],
)
def test_a_later_adapter_that_has_no_place_says_what_to_build(
    world: World, key: str, message: str
) -> None:
    base = key.split("/")[0]
    session = world.open(base)
    before = session.list_adapters()
    with pytest.raises(AdapterWeightsError, match=message):
        session.load_adapter("late", world.adapter(key), base=world.base(base))
    assert session.list_adapters() == before


def test_a_base_without_a_head_serves_rows_with_an_adapter_only(world: World) -> None:
    session = world.session("roberta")
    inputs = make_inputs(session, "roberta")
    with pytest.raises(
        InputError, match=r"adapters\[2\] names no adapter, but the base has no 'cl"
    ):
        run(session, inputs, ["head", "wide_head", None, "head"])
    with pytest.raises(InputError, match=r"adapters\[0\] names no adapter, but the base has no"):
        session.run(inputs)


def test_a_carried_dora_adapter_needs_no_base(world: World) -> None:
    session = world.open("bert")
    inputs = make_inputs(session, "bert")
    rows = ["dora", "dora_embedding", None, "plain"]
    before = run(session, inputs, rows)
    for name in ("dora", "dora_embedding"):
        session.unload_adapter(name)
        session.load_adapter(name)
    assert np.abs(run(session, inputs, rows) - before).max() < 1e-5
    with pytest.raises(AdapterError, match="pass base="):
        session.load_adapter("dora", scale=0.5)
    session.load_adapter("dora", scale=0.5, base=world.base("bert"))
    found = run(session, inputs, rows)
    expected = run_plain(world.merged("bert/dora", scale=0.5), inputs)[0]
    assert error_of(found[0], expected, inputs["attention_mask"][0]) < PEFTS_WORST


def test_the_slots_with_features_as_one_onnx_adapter(world: World, tmp_path: Path) -> None:
    """onnxruntime's own LoraAdapter API; a slot without an adapter is the base."""
    session = world.open("bert")
    empty = session.adapters["lora_only"]
    session.unload_adapter("lora_only")
    slots = session.export_adapters(tmp_path)
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "model.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    plain = _plain_onnx(world.artifact("bert"))
    names = ["dora", "wide_head", None, "dora_embedding", "lora_bias", None]
    inputs = make_inputs(session, "bert", [LENGTHS[row % 4] for row in range(len(names))])
    ids = np.array([slots[name] if name else 0 for name in names])
    ids[-1] = empty
    y = plain.run(None, {**inputs, "adapter_ids": ids}, options)[0]
    assert y.tobytes() == run(session, inputs, names).tobytes()


# D: what a build refuses


@pytest.mark.parametrize(
    ("base", "keys", "changes", "message"),
    [
        pytest.param(
            "bert",
            of("bert", "plain", "head"),
            {"task": "feature-extraction"},
            "it brings 'classifier', trained whole .modules_to_save., for which there is no place"
            " here. Choose a task whose model has this layer",
            id="a head for a task without one",
        ),
        pytest.param(
            "bert",
            of("bert", "plain", "saved_norm"),
            {},
            "LayerNorm', trained whole .modules_to_save., is no linear layer; only linear layers",
            id="a LayerNorm",
        ),
        pytest.param(
            "bert",
            of("bert", "embedding", "saved_embedding"),
            {},
            "word_embeddings', trained whole .modules_to_save., which is no torch.nn.Linear; only",
            id="an embedding",
        ),
        pytest.param(
            "gpt2",
            of("gpt2", "plain", "saved_conv1d"),
            {},
            "attn.c_proj', trained whole .modules_to_save., which is no torch.nn.Linear",
            id="a Conv1D",
        ),
        pytest.param(
            "bert",
            of("bert", "head", "wide_head"),
            {"export": {"blend": True}},
            "maps 32 to 3 features, but site 'classifier' maps 32 to 5",
            id="a blend of heads of different width",
        ),
        pytest.param(
            "bert",
            of("bert", "wide_head", "dora_head"),
            {},
            "maps 32 to 3 features, but site 'classifier' maps 32 to 5",
            id="LoRA on a head beside a wider head",
        ),
        pytest.param(
            "roberta",
            of("roberta", "head", "plain"),
            {},
            "it brings no 'classifier.*', and the base has none of its own; train it with",
            id="no head for a base without one",
        ),
    ],
)
def test_a_build_refuses(
    world: World,
    tmp_path: Path,
    base: str,
    keys: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    path = world.spec("refused", base, keys, folder=tmp_path, **changes)
    with pytest.raises(AdapterWeightsError, match=message):
        build(path, tmp_path / "out")
    assert not (tmp_path / "out/refused").exists()
