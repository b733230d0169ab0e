"""Contract 2: what of PEFT is read, what is refused by name; scalings held to PEFT itself."""

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from loraexport.parity.oracle import read_reference_adapter, reference_scaling
from loraexport_runtime.adapters.config import FIELDS, Refused
from loraexport_runtime.adapters.header import AdapterHeader, digest_adapter, read_adapter
from loraexport_runtime.adapters.sites import check_base_copies, match_sites
from loraexport_runtime.adapters.tensor_files import digest_array
from loraexport_runtime.adapters.tensors import read_lora_weights, read_saved_weights
from loraexport_runtime.errors import AdapterConfigError, AdapterWeightsError, WeightsError

torch.set_num_threads(1)

SITES = {"blocks.0.q": (8, 8), "blocks.1.v": (8, 4)}
FACTOR = "base_model.model.blocks.0.q.lora_"


def adapter(folder: Path, **config: Any) -> Path:
    return write_adapter(folder / "adapter", SITES, rank=2, config=config)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 4)
        self.qv = nn.Linear(8, 8)


class Model(nn.Module):
    """Names that patterns can confuse: q and qv, layers.1 and layers.10, inner and outer q."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block() for _ in range(11))


def save_peft(folder: Path, model: nn.Module, **config: Any) -> peft.PeftModel:
    """Apply a LoraConfig, give every factor random values, save; PEFT's own way."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    randomise(wrapped)
    wrapped.save_pretrained(str(folder))
    return wrapped


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) * 0.3)


def peft_layers(model: peft.PeftModel) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


# ---------------------------------------------------------------- the table of fields


def test_every_field_of_peft_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - set(FIELDS) == set(), "classify these in FIELDS"
    assert set(FIELDS) - fields == set(), "PEFT does not know these"


def test_the_defaults_of_peft_are_accepted(tmp_path: Path) -> None:
    defaults = json.loads(json.dumps(peft.LoraConfig(r=2).to_dict(), default=sorted))
    defaults["peft_type"] = "LORA"
    header = read_adapter(adapter(tmp_path, **defaults))
    assert {module.scaling for module in header.modules.values()} == {4.0}


REFUSED = {
    "bias": "all",
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.gate"],
    "layer_replication": [[0, 4], [2, 5]],
    "alora_invocation_tokens": [5],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"num_samples": 2},
    "ensure_weight_tying": True,
}


def test_every_refused_field_has_a_case() -> None:
    assert set(REFUSED) == {key for key, rule in FIELDS.items() if isinstance(rule, Refused)}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_field_is_named(tmp_path: Path, key: str) -> None:
    folder = adapter(tmp_path, **{key: REFUSED[key]})
    with pytest.raises(AdapterConfigError, match=rf"{key} = .* is not supported: .*Retrain"):
        read_adapter(folder)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_neutral_value_of_a_refused_field_is_accepted(tmp_path: Path, key: str) -> None:
    rule = FIELDS[key]
    assert isinstance(rule, Refused)
    default = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}[key]
    for value in (*rule.neutral, default):
        assert read_adapter(adapter(tmp_path, **{key: value})).max_rank == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task_type", "CAUSAL_LM"),
        ("lora_dropout", 0.5),
        ("fan_in_fan_out", True),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["x"]),
        ("target_modules", "all-linear"),
        ("velora_config", {"rank": 1}),
        ("inference_mode", True),
    ],
)
def test_field_without_effect_changes_nothing(tmp_path: Path, key: str, value: object) -> None:
    plain, other = adapter(tmp_path / "a"), adapter(tmp_path / "b", **{key: value})
    header, same = read_adapter(plain), read_adapter(other)
    assert [one.scaling for one in same.modules.values()] == [
        one.scaling for one in header.modules.values()
    ]
    assert same.modules.keys() == header.modules.keys()


def test_unknown_field(tmp_path: Path) -> None:
    folder = adapter(tmp_path, use_magic=True)
    with pytest.raises(AdapterConfigError, match=r"unknown field 'use_magic' = True.*not ignored"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("r", "16", "a positive integer, got '16'"),
        ("r", 2.0, "a positive integer, got 2.0"),
        ("r", 0, "a positive integer, got 0"),
        ("r", True, "a positive integer, got True"),
        ("lora_alpha", "8", "a finite number, got '8'"),
        ("lora_alpha", False, "a finite number, got False"),
        ("lora_alpha", math.nan, "a finite number, got nan"),
        ("lora_alpha", 10**400, "a finite number, got 1000"),
        ("use_rslora", "no", "true or false, got 'no'"),
        ("use_rslora", 1, "true or false, got 1"),
        ("use_dora", "yes", "true or false, got 'yes'"),
        ("lora_bias", 1, "true or false, got 1"),
        ("modules_to_save", "classifier", "a list of module names, got 'classifier'"),
        ("modules_to_save", [""], r"a list of module names, got \[''\]"),
        ("modules_to_save", [1], r"a list of module names, got \[1\]"),
        ("rank_pattern", ["q"], "an object of positive integers"),
        ("rank_pattern", {"q": 2.5}, "an object of positive integers"),
        ("alpha_pattern", {"q": "8"}, "an object of finite numbers"),
        ("alpha_pattern", {"q": math.inf}, "an object of finite numbers"),
    ],
)
def test_wrong_type_of_a_field(tmp_path: Path, key: str, value: object, expected: str) -> None:
    write_adapter(tmp_path / "adapter", SITES, rank=2)
    change_config(tmp_path / "adapter", **{key: value})
    with pytest.raises(AdapterConfigError, match=f"{key}: expected {expected}"):
        read_adapter(tmp_path / "adapter")


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_pattern_that_is_no_regular_expression(tmp_path: Path) -> None:
    folder = adapter(tmp_path, alpha_pattern={"q(": 4})
    with pytest.raises(AdapterConfigError, match=r"alpha_pattern: 'q\(' is no regular expression"):
        read_adapter(folder)


# ---------------------------------------------------------------- init_lora_weights


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_init_that_leaves_the_base_alone(tmp_path: Path, init: object) -> None:
    assert read_adapter(adapter(tmp_path, init_lora_weights=init)).modules


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_init_that_changes_the_base_names_the_conversion(tmp_path: Path, init: str) -> None:
    folder = adapter(tmp_path, init_lora_weights=init)
    expected = f"init_lora_weights = '{init}' changes the base.*path_initial_model_for_weight_conv"
    with pytest.raises(AdapterConfigError, match=expected):
        read_adapter(folder)


def test_loftq_has_no_conversion(tmp_path: Path) -> None:
    folder = adapter(tmp_path, init_lora_weights="loftq")
    with pytest.raises(AdapterConfigError, match=r"no conversion for it.*merge_and_unload\(\)"):
        read_adapter(folder)


@pytest.mark.parametrize("init", ["mica", "tomorrow", None])
def test_other_inits_are_refused(tmp_path: Path, init: object) -> None:
    folder = adapter(tmp_path, init_lora_weights=init)
    with pytest.raises(AdapterConfigError, match=r"is not supported; supported are true.*retrain"):
        read_adapter(folder)


def test_the_named_conversion_of_pissa_gives_a_plain_adapter(tmp_path: Path) -> None:
    """What the message advises, done with PEFT: W + s B A of the result is the trained layer."""
    torch.manual_seed(0)
    model = Model()
    original = model.q.weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules="q", init_lora_weights="pissa")
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].init_lora_weights = True  # else PEFT refuses the conversion
    wrapped.save_pretrained(str(tmp_path / "initial"))
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    layer = peft_layers(wrapped)["q"]
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    trained = layer.base_layer.weight + layer.get_delta_weight("default")

    wrapped.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(AdapterConfigError, match="pissa"):
        read_adapter(tmp_path / "raw")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PiSSA adapters do not mix
        wrapped.save_pretrained(
            str(tmp_path / "converted"),
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    weights = read_lora_weights(read_adapter(tmp_path / "converted"))["q"]
    assert weights.a.shape[0] == 4, "PEFT doubles the rank"
    plain = original.numpy() + weights.scaling * weights.b @ weights.a
    np.testing.assert_allclose(plain, trained.detach().numpy(), atol=1e-5)


# ---------------------------------------------------------------- scalings, held to PEFT

COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q", "v"]},
    "rslora": {"target_modules": ["q", "v"], "use_rslora": True},
    "rank_by_suffix": {"target_modules": ["q", "qv"], "rank_pattern": {"q": 2}},
    "alpha_by_suffix": {"target_modules": ["q", "v", "qv"], "alpha_pattern": {"v": 3, "qv": 5}},
    "whole_names": {
        "target_modules": ["q", "v"],
        "rank_pattern": {"encoder.layers.1.q": 2},
        "alpha_pattern": {"encoder.layers.1.v": 1.5},
    },
    "regexes": {
        "target_modules": ["q", "v"],
        "rank_pattern": {r"layers\.(1|2)\.[qv]": 2, r".*\.1\d\.q": 6},
        "alpha_pattern": {r"layers\.\d\.q": 32},
        "use_rslora": True,
    },
    "two_match_first_wins": {
        "target_modules": ["q", "v"],
        "rank_pattern": {r"layers\.1\.q": 2, "q": 5},
        "alpha_pattern": {r"layers\.1\.q": 100, r"layers\.\d\.q": 3, "q": 7},
    },
    "alternation": {"target_modules": ["q", "v"], "alpha_pattern": {"x|v": 3}},
    "one_more_letter": {"target_modules": ["v", "qv"], "alpha_pattern": {".v": 3, "v": 9}},
    "regex_target": {
        "target_modules": r"encoder\.layers\.[0-3]\.(q|v)",
        "rank_pattern": {"q": 3},
        "use_rslora": True,
    },
    "some_layers": {
        "target_modules": ["v", "qv"],
        "layers_to_transform": [1, 10],
        "layers_pattern": "layers",
        "alpha_pattern": {r"10\.v": 4},
    },
    "exclusions": {"target_modules": ["q", "v"], "exclude_modules": r".*\.v", "use_rslora": True},
}


def compare_with_peft(folder: Path) -> AdapterHeader:
    """Ranks and scalings as PEFT gives them when it loads the directory."""
    loaded = peft.PeftModel.from_pretrained(Model(), str(folder))
    layers = peft_layers(loaded)
    header = read_adapter(folder)
    assert header.modules.keys() == layers.keys()
    for name, layer in layers.items():
        assert header.modules[name].rank == layer.r["default"], name
        expected = layer.scaling["default"]
        assert header.modules[name].scaling == pytest.approx(expected, rel=1e-15), name
    return header


def compare_reference(folder: Path) -> None:
    """The oracle's scalings, which share no code with the parser, are the same."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, module in read_adapter(folder).modules.items():
        assert reference_scaling(config, name) == pytest.approx(module.scaling, rel=1e-15), name


@pytest.mark.parametrize("name", COMBINATIONS)
def test_scalings_are_those_of_peft(tmp_path: Path, name: str) -> None:
    trained = save_peft(tmp_path, Model(), r=4, lora_alpha=16, **COMBINATIONS[name])
    header = compare_with_peft(tmp_path)
    compare_reference(tmp_path)
    for module, layer in peft_layers(trained).items():
        assert header.modules[module].scaling == pytest.approx(layer.scaling["default"], rel=1e-15)
    if "pattern'" in str(COMBINATIONS[name]):
        assert len({(one.rank, one.scaling) for one in header.modules.values()}) > 1, "vacuous"


ANCHORED = {"target_modules": ["q"], "rank_pattern": {"^q": 2}, "alpha_pattern": {"^q": 5}}


def test_anchored_pattern_matches_the_whole_name_only(tmp_path: Path) -> None:
    """`^q` is the outer q alone: PEFT's optional prefix cannot stand before an anchor."""
    save_peft(tmp_path, Model(), r=4, lora_alpha=16, **ANCHORED)
    header = compare_with_peft(tmp_path)
    assert [name for name, one in header.modules.items() if one.rank == 2] == ["q"]


def test_reference_reads_an_anchored_pattern_alike(tmp_path: Path) -> None:
    save_peft(tmp_path, Model(), r=4, lora_alpha=16, **ANCHORED)
    compare_reference(tmp_path)


def test_order_of_the_file_counts_not_that_of_the_training(tmp_path: Path) -> None:
    """PEFT sorts the keys when it saves, so its own load may see another first match."""
    pattern = {"q": 7, r"layers\.1\.q": 100}
    config = {"target_modules": ["q"], "alpha_pattern": pattern}
    trained = save_peft(tmp_path, Model(), r=4, lora_alpha=16, **config)
    assert peft_layers(trained)["encoder.layers.1.q"].scaling["default"] == 7 / 4
    assert compare_with_peft(tmp_path).modules["encoder.layers.1.q"].scaling == 100 / 4
    compare_reference(tmp_path)


def test_rank_of_a_reordered_pattern_is_refused(tmp_path: Path) -> None:
    config = {"target_modules": ["q"], "rank_pattern": {"q": 5, r"layers\.1\.q": 2}}
    save_peft(tmp_path, Model(), r=4, **config)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    expected = r"'encoder\.layers\.1\.q': A has rank 5, but the config gives r = 2; several keys"
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(tmp_path)


def test_layers_to_transform_and_exclusions_show_in_the_tensors(tmp_path: Path) -> None:
    save_peft(tmp_path, Model(), r=2, **COMBINATIONS["some_layers"])
    modules = read_adapter(tmp_path).modules
    assert sorted(modules) == [
        f"encoder.layers.{n}.{name}" for n in (1, 10) for name in ("qv", "v")
    ]


def test_delta_of_a_linear_is_that_of_peft(tmp_path: Path) -> None:
    wrapped = save_peft(tmp_path, Model(), r=3, lora_alpha=5, target_modules=["v"], use_rslora=True)
    weights = read_lora_weights(read_adapter(tmp_path))
    for name, layer in peft_layers(wrapped).items():
        lora = weights[name]
        delta = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(lora.scaling * lora.b @ lora.a, delta, rtol=1e-5, atol=1e-6)


def test_conv1d_factors_are_stored_like_those_of_a_linear(tmp_path: Path) -> None:
    model = nn.Module()
    model.c_attn = Conv1D(12, 8)  # weight [in 8, out 12]
    wrapped = save_peft(tmp_path, model, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    header = read_adapter(tmp_path)
    assert (header.modules["c_attn"].in_features, header.modules["c_attn"].out_features) == (8, 12)
    lora = read_lora_weights(header)["c_attn"]
    delta = peft_layers(wrapped)["c_attn"].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose((lora.scaling * lora.b @ lora.a).T, delta, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- embeddings


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, num_hidden_layers=1, tie_word_embeddings=False, **sizes)
    return LlamaForCausalLM(config)


def save_llama(folder: Path, targets: list[str], *, save_embedding_layers: bool) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        wrapped = peft.get_peft_model(tiny_llama(), config)
    randomise(wrapped)
    wrapped.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
    return wrapped


EMBEDDING = "model.embed_tokens"


@pytest.mark.parametrize("save_embedding_layers", [False, True])
def test_embedding_adapter_of_peft(tmp_path: Path, save_embedding_layers: bool) -> None:
    wrapped = save_llama(tmp_path, ["embed_tokens"], save_embedding_layers=save_embedding_layers)
    header = read_adapter(tmp_path)
    module = header.modules[EMBEDDING]
    assert module.is_embedding
    assert (module.rank, module.in_features, module.out_features) == (2, 20, 8)
    assert module.scaling == peft_layers(wrapped)[EMBEDDING].scaling["default"] == 3.0
    lora = read_lora_weights(header)[EMBEDDING]
    delta = peft_layers(wrapped)[EMBEDDING].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose((lora.scaling * lora.b @ lora.a).T, delta, rtol=1e-5, atol=1e-6)
    assert list(header.base_copies) == ([EMBEDDING] if save_embedding_layers else [])

    reference = read_reference_adapter(tmp_path, [EMBEDDING])
    a, b, scaling = reference.sites[EMBEDDING]
    np.testing.assert_array_equal(a, lora.a)
    np.testing.assert_array_equal(b, lora.b)
    assert scaling == 3.0


@pytest.fixture(scope="module")
def with_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding LoRA with the base's embedding beside it."""
    folder = tmp_path_factory.mktemp("with_copy")
    save_llama(folder, ["embed_tokens"], save_embedding_layers=True)
    return folder


def copy_digests(weight: np.ndarray) -> tuple[dict[str, str], dict[str, str]]:
    """(site -> module, site -> digest) of a base that has this weight."""
    return {"embed_tokens": EMBEDDING}, {"embed_tokens": digest_array(weight)}


def base_embedding(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors[f"base_model.model.{EMBEDDING}.base_layer.weight"]


def test_equal_base_copy_is_accepted(with_copy: Path) -> None:
    check_base_copies(read_adapter(with_copy), *copy_digests(base_embedding(with_copy)))


def test_other_base_copy_is_refused(with_copy: Path) -> None:
    other = base_embedding(with_copy)
    other[3, 3] = np.nextafter(other[3, 3], np.float32(9))
    with pytest.raises(AdapterWeightsError, match=r"differs from the weight of this base.*=False"):
        check_base_copies(read_adapter(with_copy), *copy_digests(other))


def test_base_copy_without_a_site_is_refused(with_copy: Path) -> None:
    with pytest.raises(
        AdapterWeightsError, match=r"carries the base weight '.*base_layer\.weight'"
    ):
        check_base_copies(read_adapter(with_copy), {}, {})


def test_base_copy_may_be_stored_wider_than_the_base(tmp_path: Path, with_copy: Path) -> None:
    """A float16 checkpoint, trained in float32: the copy has the same values in another dtype."""
    narrow = base_embedding(with_copy).astype(np.float16)
    tensors = load_file(with_copy / "adapter_model.safetensors")
    tensors[f"base_model.model.{EMBEDDING}.base_layer.weight"] = narrow.astype(np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = (with_copy / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    header = read_adapter(tmp_path)
    check_base_copies(header, *copy_digests(narrow))
    with pytest.raises(AdapterWeightsError, match="in a smaller dtype"):
        check_base_copies(header, *copy_digests(base_embedding(with_copy)))


def test_base_copy_that_only_rounds_to_the_base_is_refused(with_copy: Path) -> None:
    """The copy was trained on: it is no float16 base, even where float16 hides the difference."""
    rounded = base_embedding(with_copy).astype(np.float16)
    with pytest.raises(AdapterWeightsError, match="differs from the weight of this base"):
        check_base_copies(read_adapter(with_copy), *copy_digests(rounded))


def test_whole_weights_beside_the_lora_name_the_way_out(tmp_path: Path) -> None:
    """PEFT writes untargeted embeddings too when told to; whether they were trained is unknown."""
    save_llama(tmp_path / "with", ["q_proj"], save_embedding_layers=True)
    with pytest.raises(AdapterWeightsError, match=r"lm_head\.weight' is no LoRA.*layers=False"):
        read_adapter(tmp_path / "with")
    save_llama(tmp_path / "without", ["q_proj"], save_embedding_layers=False)
    assert list(read_adapter(tmp_path / "without").modules) == ["model.layers.0.self_attn.q_proj"]


# ---------------------------------------------------------------- beside A and B, held to PEFT


class Mixed(nn.Module):
    """One layer of each kind that PEFT's LoRA knows and a whole model has a place for."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.q = nn.Linear(8, 6)
        self.v = nn.Linear(8, 4, bias=False)
        self.c_attn = Conv1D(12, 8)  # weight [in 8, out 12]
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)


@dataclasses.dataclass(frozen=True)
class Brought:
    """A LoraConfig on Mixed, and which modules bring what beside A and B."""

    config: dict[str, Any]
    features: tuple[str, ...]
    magnitude: tuple[str, ...] = ()
    lora_bias: tuple[str, ...] = ()
    base_bias: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


BROUGHT = {
    "rslora": Brought({"target_modules": ["q", "words"], "use_rslora": True}, ()),
    "dora": Brought(
        {"target_modules": ["q", "c_attn", "words"], "use_dora": True},
        ("dora",),
        magnitude=("c_attn", "q", "words"),
    ),
    "lora_bias": Brought(
        {"target_modules": ["q", "c_attn"], "lora_bias": True, "use_rslora": True},
        ("bias",),
        lora_bias=("c_attn", "q"),
    ),
    "lora_only": Brought(
        {"target_modules": ["q", "v", "c_attn", "words"], "bias": "lora_only"},
        ("bias",),
        base_bias=("c_attn", "q"),  # the others have none
    ),
    "both_biases": Brought(
        {"target_modules": ["q"], "bias": "lora_only", "lora_bias": True},
        ("bias",),
        lora_bias=("q",),
        base_bias=("q",),
    ),
    "head": Brought(
        {"target_modules": ["q"], "modules_to_save": ["head"]}, ("heads",), saved=("head",)
    ),
    "all": Brought(
        {
            "target_modules": ["q", "v"],
            "use_dora": True,
            "bias": "lora_only",
            "modules_to_save": ["head"],
        },
        ("dora", "bias", "heads"),
        magnitude=("q", "v"),
        base_bias=("q",),
        saved=("head",),
    ),
}


def save_brought(folder: Path, model: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    """Apply a LoraConfig, give everything that it trains random values, save."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        # That Conv1D needs fan_in_fan_out; that a bias of B has one dimension.
        warnings.simplefilter("ignore", UserWarning)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **config))
        with torch.no_grad():
            for value in wrapped.parameters():
                if value.requires_grad:
                    value.copy_(torch.randn_like(value) * 0.3)
        wrapped.save_pretrained(str(folder))
    return wrapped


@pytest.mark.parametrize("case", BROUGHT)
def test_what_peft_saves_beside_a_and_b_is_read(tmp_path: Path, case: str) -> None:
    brought = BROUGHT[case]
    layers = peft_layers(save_brought(tmp_path, Mixed(), brought.config))
    header = read_adapter(tmp_path)
    assert header.features == brought.features
    expected = {
        "magnitude": {
            name: layers[name].lora_magnitude_vector["default"].weight for name in brought.magnitude
        },
        "lora_bias": {name: layers[name].lora_B["default"].bias for name in brought.lora_bias},
        "base_bias": {name: layers[name].base_layer.bias for name in brought.base_bias},
    }
    weights = read_lora_weights(header)
    for role, values in expected.items():
        found = {name: getattr(one, role) for name, one in weights.items()}
        assert {name for name, one in found.items() if one is not None} == set(values), role
        for name, value in values.items():
            np.testing.assert_array_equal(found[name], value.detach().numpy())
    assert tuple(header.saved) == brought.saved


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("case", BROUGHT)
def test_the_oracle_merges_as_peft_does(tmp_path: Path, case: str, scale: float) -> None:
    torch.manual_seed(1)
    model = Mixed().double()
    kept = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    wrapped = save_brought(tmp_path, model, BROUGHT[case].config)
    for layer in peft_layers(wrapped).values():
        layer.scaling["default"] *= scale
    merged: Any = wrapped.merge_and_unload()

    sites = ["words", "q", "v", "c_attn", "head"]
    reference = read_reference_adapter(tmp_path, sites, scale)
    changed = set()
    for site in sites:
        turned = site in ("words", "c_attn")  # stored [in, out]
        weight, own = kept[f"{site}.weight"], merged.get_submodule(site)
        expected = own.weight.detach().numpy()
        found, bias = reference.merge(
            site, weight.T if turned else weight, kept.get(f"{site}.bias")
        )
        np.testing.assert_allclose(found.T if turned else found, expected, rtol=1e-10, atol=1e-12)
        if np.abs(weight - expected).max() > 0.01:
            changed.add(site)
        if bias is None:
            assert getattr(own, "bias", None) is None
        else:
            np.testing.assert_allclose(bias, own.bias.detach().numpy(), rtol=1e-10)
    brought = {*BROUGHT[case].config["target_modules"], *BROUGHT[case].saved}
    assert changed == brought, "vacuous"


def test_the_older_name_of_a_magnitude(tmp_path: Path) -> None:
    save_brought(tmp_path, Mixed(), BROUGHT["dora"].config)
    before = read_lora_weights(read_adapter(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    renamed = {
        f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: value
        for name, value in load_file(file).items()
    }
    save_file(renamed, file)
    after = read_lora_weights(read_adapter(tmp_path))
    for name, one in after.items():
        np.testing.assert_array_equal(one.magnitude, before[name].magnitude)


def test_bias_lora_only_without_a_saved_bias_leaves_the_bases_own(tmp_path: Path) -> None:
    """A layer without a bias has none to train, so the config alone promises nothing."""
    assert read_adapter(adapter(tmp_path, bias="lora_only")).features == ()


@pytest.mark.parametrize(
    ("family", "saved"),
    [
        ("Bert", {"classifier": (8, 3, True)}),
        ("Roberta", {"classifier.dense": (8, 8, True), "classifier.out_proj": (8, 3, True)}),
        ("Llama", {"score": (8, 3, False)}),
    ],
)
def test_classifiers_of_transformers(
    tmp_path: Path, family: str, saved: dict[str, tuple[int, int, bool]]
) -> None:
    """Also one that PEFT saves as a composite: each linear layer within is one module."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_attention_heads=2, num_labels=3, pad_token_id=0
    )
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    targets = ["q_proj" if family == "Llama" else "query"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        wrapped = save_brought(tmp_path, model, {"target_modules": targets, "task_type": "SEQ_CLS"})
    header = read_adapter(tmp_path)
    assert header.features == ("heads",)
    weights = read_saved_weights(header)
    assert {
        name: (one.in_features, one.out_features, one.bias is not None)
        for name, one in header.saved.items()
    } == saved
    merged: Any = wrapped.merge_and_unload()
    for name, one in weights.items():
        own = merged.get_submodule(name)
        np.testing.assert_array_equal(one.weight, own.weight.detach().numpy())
        assert (one.bias is None) == (own.bias is None)
        if one.bias is not None:
            np.testing.assert_array_equal(one.bias, own.bias.detach().numpy())


def test_layer_norm_trained_whole_is_refused_by_name(tmp_path: Path) -> None:
    save_brought(tmp_path, Mixed(), {"target_modules": ["q"], "modules_to_save": ["norm"]})
    expected = r"'norm', trained whole \(modules_to_save\), is no linear layer; only linear"
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(tmp_path)


Q = {"blocks.0.q": (8, 8)}
ROLES = {
    "magnitude": ("lora_magnitude_vector", {"use_dora": True}),
    "lora_bias": ("lora_B.bias", {"lora_bias": True}),
    "base_bias": ("base_layer.bias", {"bias": "lora_only"}),
}


def with_extra(folder: Path, role: str, value: np.ndarray | None, asked: bool) -> Path:
    """An adapter of blocks.0.q whose config asks for a role or not, with its tensor or without."""
    tensor, config = ROLES[role]
    tensors = {} if value is None else {f"base_model.model.blocks.0.q.{tensor}": value}
    return write_adapter(folder / "adapter", Q, config=config if asked else {}, tensors=tensors)


@pytest.mark.parametrize(
    ("role", "asked", "expected"),
    [
        ("magnitude", False, "has its magnitude, but the config says use_dora = False"),
        ("magnitude", True, "lacks its magnitude, but the config says use_dora = True"),
        ("lora_bias", False, "has its lora_bias, but the config says lora_bias = False"),
        ("lora_bias", True, "lacks its lora_bias, but the config says lora_bias = True"),
        ("base_bias", False, "has its base_bias, but the config says bias = 'none'"),
    ],
)
def test_config_and_tensors_that_contradict_each_other(
    tmp_path: Path, role: str, asked: bool, expected: str
) -> None:
    value = None if asked else np.ones(8, np.float32)
    with pytest.raises(AdapterWeightsError, match=rf"'blocks\.0\.q' {expected}; config and wei"):
        read_adapter(with_extra(tmp_path, role, value, asked))


@pytest.mark.parametrize("shape", [(9,), (8, 1), ()])
@pytest.mark.parametrize("role", ROLES)
def test_extra_of_another_shape(tmp_path: Path, role: str, shape: tuple[int, ...]) -> None:
    folder = with_extra(tmp_path, role, np.ones(shape, np.float32), True)
    expected = re.escape(f"{ROLES[role][0]}' has shape {list(shape)}; expected [8]")
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(folder)


@pytest.mark.parametrize("role", ROLES)
def test_quantized_extra(tmp_path: Path, role: str) -> None:
    folder = with_extra(tmp_path, role, np.ones(8, np.int32), True)
    with pytest.raises(AdapterWeightsError, match=rf"{ROLES[role][0]}' is I32; .*dequantize"):
        read_adapter(folder)


@pytest.mark.parametrize("role", ROLES)
def test_extra_that_is_not_finite(tmp_path: Path, role: str) -> None:
    header = read_adapter(with_extra(tmp_path, role, np.full(8, np.nan, np.float32), True))
    with pytest.raises(WeightsError, match=rf"{ROLES[role][0]}': 8 of 8 values are NaN or Inf"):
        read_lora_weights(header)


def test_extra_of_a_module_without_lora(tmp_path: Path) -> None:
    extra = {"base_model.model.blocks.0.k.base_layer.bias": np.ones(8, np.float32)}
    folder = write_adapter(tmp_path, Q, config={"bias": "lora_only"}, tensors=extra)
    with pytest.raises(AdapterWeightsError, match=r"'blocks\.0\.k': lora_A is missing; a site"):
        read_adapter(folder)


def with_head(folder: Path, **tensors: np.ndarray) -> Path:
    """An adapter of blocks.0.q with a whole module `head`."""
    named = {f"base_model.model.head.{name}": value for name, value in tensors.items()}
    config = {"modules_to_save": ["head"]}
    return write_adapter(folder, Q, config=config, tensors=named)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"weight": (8,)}, "is no linear layer; only linear layers can differ by row"),
        ({"weight": (3, 8, 2)}, "is no linear layer"),
        ({"bias": (3,)}, "is no linear layer"),
        ({"weight": (3, 8), "running_mean": (3,)}, "brings 'running_mean'; only linear layers can"),
        (
            {"weight": (3, 8), "bias": (4,)},
            r"has a weight of shape \[3, 8\] and a bias of \[4\]; expected \[3\]",
        ),
    ],
)
def test_whole_module_that_is_no_linear_layer(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], expected: str
) -> None:
    made = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    with pytest.raises(AdapterWeightsError, match=rf"module 'head', trained whole .*{expected}"):
        read_adapter(with_head(tmp_path, **made))


def test_quantized_head(tmp_path: Path) -> None:
    folder = with_head(tmp_path, weight=np.ones((3, 8), np.int8))
    with pytest.raises(AdapterWeightsError, match=r"head\.weight' is I8; .*dequantize"):
        read_adapter(folder)


def test_head_that_is_not_finite(tmp_path: Path) -> None:
    header = read_adapter(with_head(tmp_path, weight=np.full((3, 8), np.inf, np.float32)))
    with pytest.raises(WeightsError, match=r"head\.weight': 24 of 24 values are NaN or Inf"):
        read_saved_weights(header)


def test_whole_module_that_the_config_does_not_name(tmp_path: Path) -> None:
    with_head(tmp_path, weight=np.ones((3, 8), np.float32))
    change_config(tmp_path, modules_to_save=["classifier"])
    with pytest.raises(AdapterWeightsError, match=r"head\.weight' is no LoRA factor"):
        read_adapter(tmp_path)


def test_head_without_a_place(tmp_path: Path) -> None:
    header = read_adapter(with_head(tmp_path, weight=np.ones((3, 8), np.float32)))
    assert match_sites(header, ["blocks.0.q", "head"])["head"] == "head"
    expected = r"brings 'head', trained whole .*Choose a task .*add features: \[heads\] to the spec"
    with pytest.raises(AdapterWeightsError, match=expected):
        match_sites(header, ["blocks.0.q"])


# ---------------------------------------------------------------- names


def header_of(folder: Path, modules: list[str]) -> AdapterHeader:
    return read_adapter(write_adapter(folder, dict.fromkeys(modules, (8, 8))))


def test_sites_match_as_they_are(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q"])
    assert match_sites(header, ["layers.0.q", "layers.0.v"]) == {"layers.0.q": "layers.0.q"}


def test_causal_lm_adapter_on_the_bare_model(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["model.layers.0.q", "model.layers.1.q"])
    sites = ["layers.0.q", "layers.1.q", "layers.1.v"]
    assert match_sites(header, sites) == {
        "layers.0.q": "model.layers.0.q",
        "layers.1.q": "model.layers.1.q",
    }


def test_bare_adapter_on_the_causal_lm(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q"])
    assert match_sites(header, ["model.layers.0.q"]) == {"model.layers.0.q": "layers.0.q"}


def test_real_causal_lm_adapter_on_the_bare_names(tmp_path: Path) -> None:
    save_llama(tmp_path, ["q_proj"], save_embedding_layers=False)
    sites = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"]
    assert list(match_sites(read_adapter(tmp_path), sites)) == ["layers.0.self_attn.q_proj"]


def test_a_prefix_is_dropped_for_all_modules_or_none(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q", "model.layers.1.q"])
    with pytest.raises(AdapterWeightsError, match=r"1 of 2 modules have no site.*'model\.layers"):
        match_sites(header, ["layers.0.q", "layers.1.q"])


@pytest.mark.parametrize(
    ("modules", "sites"),
    [
        (["layers.0.q"], ["encoder.layers.0.q", "decoder.layers.0.q"]),
        (["encoder.layers.0.q", "decoder.layers.0.q"], ["layers.0.q"]),
    ],
)
def test_ambiguous_prefix(tmp_path: Path, modules: list[str], sites: list[str]) -> None:
    header = header_of(tmp_path, modules)
    with pytest.raises(AdapterWeightsError, match=r"not clear which belong together.*Name the"):
        match_sites(header, sites)


def test_modules_without_a_site(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q", "layers.0.o"])
    with pytest.raises(AdapterWeightsError, match=r"1 of 2 modules.*'layers.0.o'\. Sites here: "):
        match_sites(header, ["layers.0.q", "layers.0.v"])


# ---------------------------------------------------------------- tensors


def test_ranks_and_scalings_of_a_written_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path, rank_pattern={"v": 4}, alpha_pattern={"q": 3}, use_rslora=True)
    header = read_adapter(folder)
    assert header.rslora
    assert header.max_rank == 4
    assert header.modules["blocks.0.q"].scaling == 3 / math.sqrt(2)
    assert header.modules["blocks.1.v"].scaling == 8 / math.sqrt(4)


@pytest.mark.parametrize(("gone", "named"), [("A.weight", "lora_A"), ("B.weight", "lora_B")])
def test_half_a_pair(tmp_path: Path, gone: str, named: str) -> None:
    folder = write_adapter(tmp_path / "adapter", SITES, tensors={FACTOR + gone: None})
    expected = f"module 'blocks.0.q': {named} is missing; a site needs its pair"
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(folder)


def test_linear_and_embedding_factors_of_one_module(tmp_path: Path) -> None:
    extra = {f"{FACTOR}embedding_A": np.zeros((4, 8), np.float32)}
    folder = write_adapter(tmp_path / "adapter", SITES, tensors=extra)
    with pytest.raises(AdapterWeightsError, match="lora_embedding_B is missing; a site needs"):
        read_adapter(folder)


def test_rank_that_the_config_does_not_give(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", SITES, rank=4)
    change_config(tmp_path / "adapter", r=8)
    with pytest.raises(AdapterWeightsError, match="A has rank 4, but the config gives r = 8"):
        read_adapter(tmp_path / "adapter")


def test_a_and_b_of_different_rank(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter", SITES, tensors={f"{FACTOR}B.weight": np.zeros((8, 5), np.float32)}
    )
    with pytest.raises(AdapterWeightsError, match=r"A has shape \[4, 8\] and B \[8, 5\]"):
        read_adapter(folder)


def test_convolution_factors(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter",
        SITES,
        tensors={f"{FACTOR}A.weight": np.zeros((4, 8, 3, 3), np.float32)},
    )
    with pytest.raises(AdapterWeightsError, match=r"expected \[rank, in\] and \[out, rank\]"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.blocks.0.q.lora_C.weight",
        "base_model.model.blocks.0.q.bias",
        "blocks.0.q.lora_A.weight",
        "base_model.model.classifier.weight",
    ],
)
def test_tensor_that_is_no_factor(tmp_path: Path, name: str) -> None:
    folder = write_adapter(
        tmp_path / "adapter", SITES, tensors={name: np.zeros((2, 2), np.float32)}
    )
    with pytest.raises(AdapterWeightsError, match=f"tensor '{name}' is no LoRA factor"):
        read_adapter(folder)


def test_no_tensor_at_all(tmp_path: Path) -> None:
    with pytest.raises(AdapterWeightsError, match="holds no LoRA tensor at all"):
        read_adapter(write_adapter(tmp_path / "adapter", {}))


def test_quantized_factor(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter", SITES, tensors={f"{FACTOR}A.weight": np.zeros((4, 8), np.int8)}
    )
    with pytest.raises(AdapterWeightsError, match=r"lora_A\.weight' is I8; .*dequantize"):
        read_adapter(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    b = np.zeros((8, 4), np.float32)
    b[1, 1] = value
    folder = write_adapter(tmp_path / "adapter", SITES, tensors={f"{FACTOR}B.weight": b})
    header = read_adapter(folder)
    assert read_lora_weights(header, ["blocks.1.v"]).keys() == {"blocks.1.v"}
    with pytest.raises(WeightsError, match=r"lora_B\.weight': 1 of 32 values are NaN or Inf"):
        read_lora_weights(header)


def test_bfloat16_factors_are_read_exactly(tmp_path: Path) -> None:
    a = np.random.default_rng(0).standard_normal((4, 8)).astype(ml_dtypes.bfloat16)
    folder = write_adapter(tmp_path / "adapter", SITES, tensors={f"{FACTOR}A.weight": a})
    read = read_lora_weights(read_adapter(folder))["blocks.0.q"].a
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.astype(np.float32), a.astype(np.float32))


def test_bfloat16_adapter_of_peft(tmp_path: Path) -> None:
    model = Model().to(torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["v"])
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    header = read_adapter(tmp_path)
    assert {module.a[1].dtype for module in header.modules.values()} == {"BF16"}
    weights = read_lora_weights(header)
    for name, layer in peft_layers(wrapped).items():
        stored = layer.lora_B["default"].weight.detach().float().numpy()
        np.testing.assert_array_equal(weights[name].b.astype(np.float32), stored)


# ---------------------------------------------------------------- directories


def test_bin_adapter_is_refused_with_a_command_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    wrapped = save_peft(folder, Model(), r=2, target_modules=["v"])
    expected = read_lora_weights(read_adapter(folder))
    (folder / "adapter_model.safetensors").unlink()
    wrapped.save_pretrained(str(folder), safe_serialization=False)
    with pytest.raises(WeightsError, match=r"\.bin adapter is unpickled.*python -c") as caught:
        read_adapter(folder)

    code = str(caught.value).split('python -c "')[1].removesuffix('"')
    exec(code, {})  # the command of the message, word for word
    converted = read_lora_weights(read_adapter(folder))
    assert converted.keys() == expected.keys()
    for name, lora in converted.items():
        np.testing.assert_array_equal(lora.b, expected[name].b)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(AdapterConfigError, match=r"adapter_config\.json: no such file; a PEFT ada"):
        read_adapter(tmp_path)


def test_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("")
    with pytest.raises(AdapterConfigError, match="cannot be read: Not a directory"):
        read_adapter(tmp_path / "adapter")


def test_directory_without_weights(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors: no such file; a PEFT ada"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "peft_type is None; only 'LORA'"),
        ('{"peft_type": "IA3"}', "peft_type is 'IA3'; only 'LORA'"),
        ('{"peft_type": "ADALORA", "r": 8}', "peft_type is 'ADALORA'"),
    ],
    ids=["open", "empty", "deep", "list", "no_type", "ia3", "adalora"],
)
def test_broken_config(tmp_path: Path, text: str, expected: str) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterConfigError, match=rf"adapter_config\.json: {expected}"):
        read_adapter(folder)


def test_config_that_is_not_utf8(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(AdapterConfigError, match="not JSON"):
        read_adapter(folder)


def test_digest_covers_config_and_weights(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    digests = {digest_adapter(folder)}
    change_config(folder, lora_alpha=9)
    digests.add(digest_adapter(folder))
    write_adapter(folder, SITES, rank=2, seed=9, alpha=9)
    digests.add(digest_adapter(folder))
    assert len(digests) == 3
