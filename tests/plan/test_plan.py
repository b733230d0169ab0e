"""Spec and headers -> sites, ranks, stacks, strategy, costs; and every base that cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import Project
from support.models import write_base

from loraexport.cli.show_plan import plan_dict, print_plan
from loraexport.errors import BaseModelError, SpecError, UsageError
from loraexport.pipeline.build import build
from loraexport.plan.layer import LayerPlan
from loraexport.plan.plan import Plan, make_plan
from loraexport.plan.strategy import choose_strategy
from loraexport.spec.reader import read_spec
from loraexport.spec.schema import Spec
from loraexport_runtime.errors import (
    AdapterConfigError,
    AdapterError,
    AdapterWeightsError,
    WeightsError,
)


def plan_of(project: Project, **changes: Any) -> Plan:
    path = project.spec(**changes)
    return make_plan(read_spec(path), path.parent)


def layers(*given: dict[str, Any], **base: Any) -> dict[str, Any]:
    """The spec's `base` with these layers."""
    source = base or {"path": "base"}
    return {"kind": "layers", **source, "layers": list(given)}


def linear(site: str = "blocks.0.up", **keys: Any) -> dict[str, Any]:
    return {"name": "up", "type": "linear", "site": site, **keys}


QKV = {
    "name": "qkv",
    "type": "linear",
    "slices": [{"name": part, "site": f"blocks.0.{part}"} for part in ("q", "k", "v")],
}
WORDS = {"name": "words", "type": "embedding", "site": "words"}


@pytest.fixture
def words(project: Project) -> dict[str, Any]:
    """Changes to the spec: an embedding layer and its adapter."""
    folder = project.folder / "words"
    write_adapter(folder, {"words": (40, 32)}, rank=2, embeddings=("words",))
    return {"base": layers(WORDS), "adapters": [{"name": "words", "path": "words"}]}


# ---------------------------------------------------------------- what a plan says


def test_sites_ranks_and_slots(project: Project) -> None:
    plan = plan_of(project)
    qkv, up = (one.layer for one in plan.layers)
    assert (plan.num_slots, plan.max_rank) == (2, 8)
    assert [(part.name, part.site, part.offset, part.width) for part in qkv.slices] == [
        ("q", "blocks.0.q", 0, 32),
        ("k", "blocks.0.k", 32, 16),
        ("v", "blocks.0.v", 48, 16),
    ]
    assert (qkv.in_features, qkv.out_features) == (32, 64)
    assert (up.in_features, up.out_features) == (32, 48)
    sql, chat = plan.adapters
    assert (sql.slot, chat.slot) == (1, 2)
    assert {site: (one.rank, one.scaling) for site, one in sql.sites.items()} == {
        "blocks.0.q": (4, 2.0),
        "blocks.0.up": (4, 2.0),
        "blocks.0.v": (4, 2.0),
    }
    assert list(chat.sites) == ["blocks.0.k", "blocks.0.q"]
    assert chat.sites["blocks.0.q"].scaling == 8 / 8**0.5 * 0.5, "rsLoRA, times the spec's scale"


def test_biases_are_found_by_name(project: Project) -> None:
    qkv, up = plan_of(project).layers
    assert [source.has_bias for source in qkv.sources] == [True, True, True]
    assert qkv.sources[0].bias is not None
    assert qkv.sources[0].bias[0] == "blocks.0.q.bias"
    assert not up.sources[0].has_bias
    without = plan_of(project, base=layers(linear("blocks.0.q", bias=False)), adapters=ONLY_Q)
    assert not without.layers[0].sources[0].has_bias


ONLY_Q = [{"name": "q", "path": "only_q"}]


@pytest.fixture(autouse=True)
def only_q(project: Project) -> None:
    write_adapter(project.folder / "only_q", {"blocks.0.q": (32, 32)}, rank=2)


@pytest.mark.parametrize("strategy", ["segmented", "masked", "augmented", "chunked"])
def test_stacks(project: Project, strategy: str) -> None:
    """2 slots, 3 slices of rank 8: every slot owns a block of 24 rows."""
    plan = plan_of(project, export={"strategy": strategy})
    a, b = plan.layers[0].layer.stacks
    augmented = strategy == "augmented"
    # W^T, and 8 rows for the bias of q, k and v.
    assert (a.name, a.shape) == ("qkv.lora_A", (8 + 48, 32) if augmented else (48, 32))
    assert (a.rows_per_slot, a.row_offset) == (24, 8 if augmented else 0)
    assert b.name == ("qkv.weight_lora_B" if augmented else "qkv.lora_B")
    assert b.shape == ((32 + 8 + 48, 64) if augmented else (48, 64))
    assert (b.rows_per_slot, b.row_offset) == (24, 40 if augmented else 0)
    assert (plan.layers[0].layer.base_rows is not None) == augmented


def test_stacks_of_an_embedding(project: Project, words: dict[str, Any]) -> None:
    layer = plan_of(project, **words, slots=3).layers[0].layer
    a, b = layer.stacks
    assert (layer.in_features, layer.out_features) == (40, 32)
    assert (a.shape, a.rows_per_slot) == ((3 * 40, 2), 40)
    assert (b.shape, b.rows_per_slot) == ((3 * 2, 32), 2)


def test_costs_by_hand(project: Project) -> None:
    """qkv: 32 -> 64; 2 slots x 3 slices x rank 8 = 48 stack rows, 24 of them one slot's."""
    export = {"strategy": "masked", "tune": {"tokens": 10}}
    qkv = plan_of(project, export=export).layers[0]
    assert qkv.base_bytes == 4 * 32 * 64
    assert qkv.lora_bytes == 4 * (48 * 32 + 48 * 64)
    assert qkv.base_flops_per_token == 2 * 32 * 64
    assert qkv.lora_flops_per_token == 2 * 48 * (32 + 64), "masked computes every slot"
    half = plan_of(project, export=export | {"dtype": "float16"}).layers[0]
    assert (half.base_bytes, half.lora_bytes) == (qkv.base_bytes // 2, qkv.lora_bytes // 2)


@pytest.mark.parametrize(
    ("strategy", "slots"), [("segmented", 1), ("chunked", 1), ("masked", 2), ("augmented", 2)]
)
def test_flops_count_the_slots_that_a_strategy_computes(
    project: Project, strategy: str, slots: int
) -> None:
    up = plan_of(project, export={"strategy": strategy}).layers[1]
    assert up.lora_flops_per_token == slots * 2 * 8 * (32 + 48)


def test_costs_of_an_embedding(project: Project, words: dict[str, Any]) -> None:
    layer = plan_of(project, **words).layers[0]
    assert layer.base_flops_per_token == 0, "a gather"
    assert layer.lora_flops_per_token == 2 * 2 * 32, "the shrink is a gather, too"
    assert layer.base_bytes == 4 * 40 * 32
    assert layer.lora_bytes == 4 * (40 * 2 + 2 * 32)


def test_more_adapters_than_slots(project: Project) -> None:
    plan = plan_of(project, slots=1)
    assert [adapter.slot for adapter in plan.adapters] == [1, None]
    assert plan.max_rank == 8, "those that are paged in later must fit"
    stack = plan.layers[0].layer.stacks[0]
    assert (stack.shape, stack.rows(1)) == ((8 + 24, 32), slice(8, 32))


def test_more_slots_than_adapters(project: Project) -> None:
    plan = plan_of(project, slots=5, max_rank=16)
    assert plan.layers[1].layer.stacks[0].shape == (5 * 16, 32)


def test_a_plan_of_more_memory_than_any_machine_has(project: Project) -> None:
    wide = {"in_features": 2**24, "out_features": 2**24, "bias": False}
    base = layers(linear(**wide), init={"seed": 0})
    write_adapter(project.folder / "sql", {"blocks.0.up": (8, 8)}, rank=1)
    adapters = [{"name": "sql", "path": "sql"}]
    with pytest.raises(SpecError, match=r"slots: 1 slots of rank 1 at 1 layers are .* at most 1,0"):
        plan_of(project, base=base, adapters=adapters)
    with pytest.raises(SpecError, match=r"slots: 65536 slots of rank 65536 at 1 layers are .*GiB"):
        plan_of(project, base=layers(linear()), adapters=adapters, slots=2**16, max_rank=2**16)


def test_a_build_of_more_memory_than_this_machine_has(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysconf = os.sysconf
    few = {"SC_PHYS_PAGES": 1}
    monkeypatch.setattr(os, "sysconf", lambda name: few.get(name) or sysconf(name))
    with pytest.raises(UsageError, match=r"2 slots of rank \d+ and the base's .* larger machine"):
        build(project.spec(), project.folder / "artifacts")
    assert not (project.folder / "artifacts").exists()


def test_init_base(project: Project) -> None:
    up = linear(in_features=32, out_features=48, bias=True)
    q = {"name": "q", "type": "linear", "in_features": 32, "out_features": 32}
    sql = {"name": "q", "path": "for_init"}
    write_adapter(project.folder / "for_init", {"q": (32, 32)}, rank=2)
    plan = plan_of(project, base=layers(up, q, init={"seed": 3}), adapters=[sql])
    assert plan.base_source == "init seed 3"
    assert [one.sources[0].has_bias for one in plan.layers] == [True, False]
    assert plan.layers[1].layer.slices[0].site == "q", "without a site the layer's name is one"


def test_conv1d_weight_is_stored_transposed(project: Project) -> None:
    write_base(project.folder / "gpt", {"h.c_attn.weight": np.zeros((32, 96), np.float32)})
    write_adapter(project.folder / "c_attn", {"h.c_attn": (32, 96)})
    layer = linear("h.c_attn", fan_in_fan_out=True)
    adapters = [{"name": "x", "path": "c_attn"}]
    plan = plan_of(project, base=layers(layer, path="gpt"), adapters=adapters)
    assert (plan.layers[0].layer.in_features, plan.layers[0].layer.out_features) == (32, 96)
    assert plan.layers[0].fan_in_fan_out


def test_weight_by_tensor_name(project: Project) -> None:
    layer = {"name": "up", "type": "linear", "weight": "blocks.0.q.weight"}
    plan = plan_of(project, base=layers(layer), adapters=ONLY_Q)
    assert plan.layers[0].layer.slices[0].site == "blocks.0.q"
    assert plan.layers[0].sources[0].has_bias


# ---------------------------------------------------------------- strategy


def tuned(project: Project, tokens: int, device: str = "cuda", strategy: str = "auto") -> Spec:
    tune = {"device": device, "tokens": tokens}
    return read_spec(project.spec(export={"strategy": strategy, "tune": tune}))


@pytest.mark.parametrize(
    ("kind", "device", "slots", "tokens", "expected", "reason"),
    [
        ("linear", "cuda", 8, 4096, "augmented", "least by the costs of one NVIDIA H200 for 4096"),
        ("linear", "cuda", 128, 128, "augmented", "least by the costs of one NVIDIA H200 for 128 "),
        ("linear", "cuda", 512, 65536, "chunked", "least by the costs of one NVIDIA H200 for 65"),
        ("linear", "cuda", 32, 4096, "augmented", "least by the costs of one NVIDIA H200"),
        ("linear", "cpu", 128, 8192, "masked", "on a CPU masked costs least"),
        ("embedding", "cuda", 8, 4096, "masked", "its shrink is a gather"),
        ("embedding", "cpu", 8, 8, "masked", "on a CPU"),
    ],
)
def test_auto(
    project: Project, kind: Any, device: str, slots: int, tokens: int, expected: str, reason: str
) -> None:
    spec = tuned(project, tokens, device)
    strategy, why = choose_strategy(kind, spec, slots, 16, 4096, 4096)
    assert strategy == expected
    assert why.startswith(reason)


def test_auto_leaves_out_what_kernels_cannot_take(project: Project) -> None:
    export = {"kernels": True, "tune": {"tokens": 65536}}
    strategy, why = choose_strategy(
        "linear", read_spec(project.spec(export=export)), 512, 16, 4096, 4096
    )
    assert strategy in ("masked", "augmented")
    assert "chunked" not in why


def test_auto_by_the_costs_of_another_gpu(project: Project) -> None:
    """Where kernels cost nothing and bytes much, a narrow output is better added than joined."""
    costs = {"device": "slow memory", "launch": 0.0, "gbyte": 1000.0, "gflop": 1.0}
    tune = {"device": "cuda", "tokens": 4096, "costs": costs}
    spec = read_spec(project.spec(export={"tune": tune}))
    strategy, why = choose_strategy("linear", spec, 2, 8, 8192, 512)
    assert strategy == "masked"
    assert "slow memory" in why
    assert choose_strategy("linear", spec, 2, 8, 512, 8192)[0] == "augmented"


def test_auto_by_the_kernels_costs(project: Project) -> None:
    """Where these are known they choose for graphs with functions; stock operators' else."""
    stock = {"device": "slow memory", "launch": 0.0, "gbyte": 1000.0, "gflop": 1.0}
    terms = {"launch": 2.0, "gbyte": 500.0, "gflop": 1.0}

    def choose(kernels: bool, costs: dict[str, Any]) -> tuple[str, str]:
        tune = {"device": "cuda", "tokens": 4096, "costs": costs}
        spec = read_spec(project.spec(export={"kernels": kernels, "tune": tune}))
        return choose_strategy("linear", spec, 2, 8, 8192, 512, has_bias=True)

    strategy, why = choose(True, stock | {"kernels": terms})
    assert strategy == "augmented"
    used = (4096 * 8192 + 2 * 8 * (8192 + 512)) * 4 + 2 * 4 * 4096 * 8
    expected = 2 + 500 * used / 1e9 + 2 * 4096 * 8 * (8192 + 512) / 1e9
    assert why.startswith(
        "least by the costs of the kernels on one slow memory for 4096 tokens and 2 slots:"
        f" {expected:.1f} us over the base; masked "
    )
    _, why = choose(True, stock | {"kernels": terms | {"device": "fast memory"}})
    assert why.startswith("least by the costs of the kernels on one fast memory for 4096 tokens")
    assert choose(False, stock | {"kernels": terms})[0] == "masked"
    strategy, why = choose(True, stock)
    assert strategy == "masked"
    assert why.startswith("least by the costs of one slow memory for 4096 tokens and 2 slots: ")
    assert why.endswith("; by stock operators, as these costs have no terms of the kernels")


def test_costs_are_strict(project: Project) -> None:
    kernels = {"launch": 1.0, "gbyte": 1, "gflop": "1.0", "shrink": 1.0}
    costs = {"device": "x", "launch": 1.0, "gbyte": 1.0, "gflops": 1.0, "kernels": kernels}
    tune = {"costs": costs}
    spec = project.spec(export={"tune": tune})
    with pytest.raises(SpecError) as caught:
        read_spec(spec)
    found = {one.path: (one.message, one.hint) for one in caught.value.problems}
    assert found == {
        "export.tune.costs.gflop": ("required key is missing", "add it"),
        "export.tune.costs.gflops": ("unknown key", "did you mean 'gflop'?"),
        "export.tune.costs.kernels.gflop": (
            "expected number, got '1.0'",
            "write it without quotes",
        ),
        "export.tune.costs.kernels.shrink": (
            "unknown key",
            "remove it; 'loraexport schema' lists the keys",
        ),
    }


@pytest.mark.parametrize("strategy", ["segmented", "masked", "augmented", "chunked"])
def test_the_strategy_that_the_spec_asks_for(project: Project, strategy: str) -> None:
    spec = tuned(project, 8, strategy=strategy)
    assert choose_strategy("linear", spec, 2, 16, 64, 64) == (strategy, "the spec asks for it")


def test_augmented_embedding_becomes_masked(project: Project, words: dict[str, Any]) -> None:
    plan = plan_of(project, **words, export={"strategy": "augmented"})
    assert plan.layers[0].layer.strategy == "masked"
    assert plan.layers[0].strategy_reason.startswith("an embedding has no [W ; B] product")


# ---------------------------------------------------------------- showing it


def test_plan_as_json(project: Project) -> None:
    data = json.loads(json.dumps(plan_dict(plan_of(project, export={"tune": {"tokens": 10}}))))
    assert [adapter["name"] for adapter in data["adapters"]] == ["sql", "chat"]
    qkv = data["layers"][0]
    assert qkv["sites"] == ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
    assert qkv["stack_width"] == 48
    assert qkv["base_flops"] == 10 * 2 * 32 * 64
    assert (qkv["strategy"], qkv["reason"].split()[0]) == ("augmented", "least")


@pytest.mark.parametrize("width", [80, 40])
def test_plan_as_text_cuts_nothing_off(project: Project, width: int) -> None:
    plan = plan_of(project, slots=1)
    text = shown(plan, width)
    assert "…" not in text
    assert "tiny: float32, 1 slots of rank 8, base base\n" in text
    for site in ("blocks.0.q, blocks.0.k, blocks.0.v", "blocks.0.up"):
        assert site in text
    if width == 80:
        assert "not loaded" in text
        assert "GFLOP, 512 tokens" in text
    assert "augmented: least by the costs of one NVIDIA H200 for 512 tokens and 1 slots: " in text
    assert " (qkv)" in text
    assert " (up)" in text


def shown(plan: Plan, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        print_plan(plan, console)
    return captured.get()


def test_a_path_is_no_markup(project: Project) -> None:
    name = "[bold] :smile: [old]"
    (project.folder / "base").rename(project.folder / name)
    assert f"base {name}\n" in shown(plan_of(project, base=layers(QKV, linear(), path=name)))


def test_planning_imports_no_torch(project: Project) -> None:
    """Nor does anything but a build or verify: an import of torch is an error here."""
    path = project.spec()
    code = f"""
import sys
sys.modules["torch"] = None
sys.argv = ["loraexport", "plan", {str(path)!r}, "--json"]
from loraexport.cli.app import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny"


# ---------------------------------------------------------------- checkpoints


def shard(folder: Path, **index: str) -> Path:
    """Split the base into a shard per tensor prefix, with an index; `index` overrides entries."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = {name: f"model-{'2' if 'up' in name else '1'}.safetensors" for name in tensors}
    for shard_name in sorted(set(names.values())):
        part = {name: tensors[name] for name in tensors if names[name] == shard_name}
        save_file(part, folder / shard_name)
    weight_map = names | {key.replace("__", "."): value for key, value in index.items()}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_sharded_checkpoint(project: Project) -> None:
    whole = plan_of(project)
    shard(project.folder / "base")
    plan = plan_of(project)
    assert [one.layer for one in plan.layers] == [one.layer for one in whole.layers]
    files = [source.weight[1].path.name for one in plan.layers for source in one.sources]  # type: ignore[index]
    assert files == ["model-1.safetensors"] * 3 + ["model-2.safetensors"]


def test_shards_go_before_a_single_file(project: Project) -> None:
    """As in transformers the index wins: the other file may be of another time."""
    folder = project.folder / "base"
    shard(folder)
    save_file({"other": np.zeros(1, np.float32)}, folder / "model.safetensors")
    assert plan_of(project).layers[0].layer.in_features == 32


def test_only_file_may_have_any_name(project: Project) -> None:
    folder = project.folder / "base"
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert plan_of(project).layers[0].layer.in_features == 32


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (
            {"blocks__0__q__weight": "model-2.safetensors"},
            r"says that 'blocks\.0\.q\.weight' is in model-2\.safetensors, but it is not there",
        ),
        ({"gone": "model-9.safetensors"}, r"shard model-9\.safetensors is not there; the download"),
        ({"x": "../model-1.safetensors"}, r"shard '\.\./model-1\.safetensors' is not a file of"),
        ({"x": "/etc/passwd"}, r"shard '/etc/passwd' is not a file of this folder; a shard lies"),
        ({"x": "sub/model-1.safetensors"}, r"shard 'sub/model-1\.safetensors' is not a file of"),
        ({"x": ".."}, r"shard '\.\.' is not a file of this folder"),
        ({"x": ""}, r"shard  is not there"),
    ],
)
def test_index_that_disagrees_with_its_shards(
    project: Project, index: dict[str, str], expected: str
) -> None:
    shard(project.folder / "base", **index)
    with pytest.raises(BaseModelError, match=expected):
        plan_of(project)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[]", "expected an object, got a list"),
        ("{}", "key 'weight_map' is missing"),
        ('{"weight_map": []}', "weight_map: expected an object, got a list"),
        ("\x00", "not JSON: Expecting value"),
        ("", "the file is empty"),
    ],
)
def test_broken_index(project: Project, text: str, expected: str) -> None:
    (project.folder / "base/model.safetensors.index.json").write_text(text)
    with pytest.raises(BaseModelError, match=rf"model\.safetensors\.index\.json: {expected}"):
        plan_of(project)


def test_empty_index(project: Project) -> None:
    (project.folder / "base/model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(BaseModelError, match="weight_map is empty"):
        plan_of(project)


def test_damaged_shard(project: Project) -> None:
    folder = shard(project.folder / "base")
    data = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(data[:-1])
    with pytest.raises(WeightsError, match=r"model-2\.safetensors: not a whole safetensors file"):
        plan_of(project)


def test_two_files_without_an_index(project: Project) -> None:
    folder = project.folder / "base"
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(BaseModelError, match=r"2 safetensors files but no model\.safetensors\.ind"):
        plan_of(project)


def test_only_pickled_weights(project: Project) -> None:
    (project.folder / "base/model.safetensors").rename(project.folder / "base/pytorch_model.bin")
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin: \.bin files are unpickled on load"
    ):
        plan_of(project)


def test_no_weights_at_all(project: Project) -> None:
    (project.folder / "base/model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no safetensors file here; expected model"):
        plan_of(project)


def test_missing_base(project: Project) -> None:
    with pytest.raises(BaseModelError, match="no such directory; paths are relative to the spec's"):
        plan_of(project, base=layers(linear(), path="./nowhere"))


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("site", "closest"),
    [
        ("model.blocks.0.up", "blocks.0.up.weight"),
        ("0.up", "blocks.0.up.weight"),
        ("blocks.0.upp", "blocks.0.up.weight"),
        ("other.5.thing", "blocks.0.k.bias"),
    ],
)
def test_absent_tensor_names_close_ones(project: Project, site: str, closest: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        plan_of(project, base=layers(QKV, linear(site)))
    message = str(caught.value)
    assert message.startswith(f"base layer 'up': the base has no tensor '{site}.weight'; of its")
    assert closest in message


def test_slice_is_named(project: Project) -> None:
    layer = {"name": "qkv", "type": "linear", "slices": [{"name": "q", "site": "zz"}]}
    with pytest.raises(
        BaseModelError, match=r"base layer 'qkv', slice 'q': the base has no tensor"
    ):
        plan_of(project, base=layers(layer))


def test_absent_bias(project: Project) -> None:
    with pytest.raises(BaseModelError, match=r"the base has no tensor 'blocks\.0\.up\.bias'"):
        plan_of(project, base=layers(linear(bias=True)))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"in_features": 64}, r"has shape \[48, 32\], so 32 input features; expected 64"),
        ({"out_features": 32}, r"has shape \[48, 32\], so 48 output features; expected 32"),
        ({"fan_in_fan_out": True, "in_features": 32}, r"so 48 input features; expected 32"),
        ({"weight": "blocks.0.q.bias"}, r"'blocks\.0\.q\.bias' has shape \[32\], not a matrix"),
        (
            {"bias": "blocks.0.q.bias"},
            r"bias 'blocks\.0\.q\.bias' has shape \[32\];\s+expected \[48",
        ),
        ({"bias": "blocks.0.q.weight"}, r"bias 'blocks\.0\.q\.weight' has shape \[32, 32\]"),
    ],
)
def test_tensor_of_another_shape(project: Project, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(BaseModelError, match=rf"base layer 'up': .*{expected}"):
        plan_of(project, base=layers(linear(**keys)))


def test_embedding_of_another_size(project: Project, words: dict[str, Any]) -> None:
    words["base"] = layers(WORDS | {"num_embeddings": 50})
    with pytest.raises(
        BaseModelError, match=r"shape \[40, 32\], so 40 input features; expected 50"
    ):
        plan_of(project, **words)


def test_slices_of_different_input(project: Project) -> None:
    write_base(
        project.folder / "odd",
        {"a.weight": np.zeros((4, 8), np.float32), "b.weight": np.zeros((4, 9), np.float32)},
    )
    layer = QKV | {"slices": [{"name": "a", "site": "a"}, {"name": "b", "site": "b"}]}
    with pytest.raises(
        BaseModelError, match=r"slice 'b': .* 9 input.*expected 8, by the spec or by"
    ):
        plan_of(project, base=layers(layer, path="odd"))


@pytest.mark.parametrize("name", ["blocks.0.up.weight", "blocks.0.up.bias"])
def test_quantized_tensor(project: Project, name: str) -> None:
    tensors = {
        "blocks.0.up.weight": np.zeros((48, 32), np.float32),
        "blocks.0.up.bias": np.zeros(48, np.float32),
    }
    tensors[name] = tensors[name].astype(np.int8)
    write_base(project.folder / "int8", tensors)
    with pytest.raises(BaseModelError, match=rf"tensor '{name}' is I8; dequantize the base first"):
        plan_of(project, base=layers(linear(), path="int8"))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"name": "x", "type": "linear"}, "give site or weight, so that the tensor can be found"),
        ({"name": "x", "type": "embedding"}, "give site or weight"),
    ],
)
def test_layer_without_a_tensor(project: Project, layer: dict[str, Any], expected: str) -> None:
    with pytest.raises(BaseModelError, match=f"base layer 'x': {expected}"):
        plan_of(project, base=layers(layer))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (linear(), "with `init` both sizes must be given"),
        (linear(in_features=4), "with `init` both sizes must be given"),
        (WORDS | {"num_embeddings": 4}, "with `init` both sizes must be given"),
        (linear(weight="a.weight"), "names a tensor, but the base is `init`; give a path"),
        (linear(bias="a.bias"), "names a tensor, but the base is `init`; give a path"),
    ],
)
def test_init_that_says_too_little(project: Project, layer: dict[str, Any], expected: str) -> None:
    with pytest.raises(BaseModelError, match=expected):
        plan_of(project, base=layers(layer, init={"seed": 0}))


def test_site_in_two_layers(project: Project) -> None:
    again = linear("blocks.0.q") | {"name": "again"}
    with pytest.raises(
        BaseModelError, match=r"site 'blocks\.0\.q' is in layer 'qkv' and in 'again'"
    ):
        plan_of(project, base=layers(QKV, again))


def test_site_twice_in_a_layer(project: Project) -> None:
    layer = QKV | {"slices": [{"name": name, "site": "blocks.0.q"} for name in "ab"]}
    with pytest.raises(BaseModelError, match=r"site 'blocks\.0\.q' is twice in layer 'qkv'"):
        plan_of(project, base=layers(layer))


# ---------------------------------------------------------------- adapters that do not fit


def plan_adapter(project: Project, sites: dict[str, tuple[int, int]], **keys: Any) -> Plan:
    changes = {key: keys.pop(key) for key in ("base", "max_rank") if key in keys}
    write_adapter(project.folder / "new", sites, **keys)
    return plan_of(project, adapters=[{"name": "new", "path": "new"}], **changes)


def test_rank_above_max_rank(project: Project) -> None:
    expected = r"'blocks\.0\.q' has rank 16, above max_rank 8; set max_rank: 16 in the spec"
    with pytest.raises(AdapterWeightsError, match=expected):
        plan_adapter(project, {"blocks.0.q": (32, 32)}, rank=16, max_rank=8)


def test_adapter_for_sites_that_the_spec_has_not(project: Project) -> None:
    with pytest.raises(
        AdapterWeightsError, match=r"'blocks\.1\.q'\. Sites here: .*Add the missing"
    ):
        plan_adapter(project, {"blocks.0.q": (32, 32), "blocks.1.q": (32, 32)})


def test_shapes_that_disagree_with_the_base(project: Project) -> None:
    expected = r"maps 32 to 24 features, but site 'blocks\.0\.k' maps 32 to 16; .*another base"
    with pytest.raises(AdapterWeightsError, match=expected):
        plan_adapter(project, {"blocks.0.k": (32, 24)})


def test_embedding_adapter_on_a_linear_layer(project: Project) -> None:
    expected = r"'blocks\.0\.q' is an embedding LoRA, but layer 'qkv' is of kind linear"
    with pytest.raises(AdapterWeightsError, match=expected):
        plan_adapter(project, {"blocks.0.q": (32, 32)}, embeddings=("blocks.0.q",))


def test_linear_adapter_on_an_embedding(project: Project) -> None:
    expected = "'words' is a linear LoRA, but layer 'words' is of kind embedding"
    with pytest.raises(AdapterWeightsError, match=expected):
        plan_adapter(project, {"words": (40, 32)}, base=layers(WORDS))


@pytest.mark.parametrize(
    ("feature", "config", "tensor"),
    [
        ("dora", {"use_dora": True}, "blocks.0.q.lora_magnitude_vector"),
        ("bias", {"lora_bias": True}, "blocks.0.q.lora_B.bias"),
        ("bias", {"bias": "lora_only"}, "blocks.0.q.base_layer.bias"),
    ],
)
def test_what_a_single_layer_has_no_place_for(
    project: Project, feature: str, config: dict[str, Any], tensor: str
) -> None:
    tensors = {f"base_model.model.{tensor}": np.ones(32, np.float32)}
    expected = rf"it uses {feature} .*single layer has no place for; .*base\.kind: transformers"
    with pytest.raises(AdapterConfigError, match=expected):
        plan_adapter(project, {"blocks.0.q": (32, 32)}, config=config, tensors=tensors)


def test_head_for_a_single_layer(project: Project) -> None:
    tensors = {"base_model.model.blocks.0.up.weight": np.ones((48, 32), np.float32)}
    with pytest.raises(AdapterConfigError, match=r"it uses heads .*no place for"):
        plan_adapter(
            project,
            {"blocks.0.q": (32, 32)},
            config={"modules_to_save": ["up"]},
            tensors=tensors,
        )


def test_adapter_of_the_causal_lm(project: Project) -> None:
    (project.folder / "base/config.json").write_text('{"model_type": "llama"}')
    plan = plan_adapter(project, {"model.blocks.0.q": (32, 32), "model.blocks.0.up": (32, 48)})
    assert plan.adapters[0].modules == {
        "blocks.0.q": "model.blocks.0.q",
        "blocks.0.up": "model.blocks.0.up",
    }


def test_missing_adapter_directory(project: Project) -> None:
    with pytest.raises(AdapterError, match=r"no such directory; paths are relative to the spec's"):
        plan_of(project, adapters=[{"name": "x", "path": "./typo"}])


def test_plan_holds_every_layer_of_the_spec(project: Project) -> None:
    plan = plan_of(project)
    assert all(isinstance(one, LayerPlan) for one in plan.layers)
    assert [one.layer.name for one in plan.layers] == ["qkv", "up"]
    assert plan.layers[0].layer.onnx == "graphs/qkv.onnx"
    only = plan_of(project, export={"formats": ["torchscript"]}).layers[0].layer
    assert (only.onnx, only.torchscript) == (None, "graphs/qkv.ts")
