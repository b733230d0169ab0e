"""Rows that blend several adapters: the base plus the weighted differences."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from support.peft_features import (
    BLENDED,
    IMPLEMENTATIONS,
    LENGTHS,
    PEFTS_WORST,
    World,
    error_of,
    make_inputs,
    of,
    plain_onnx,
    run,
    run_plain,
)

from loraexport.bases.model import load_model_base
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport.tensors import to_torch
from loraexport_runtime import (
    InputError,
)

# PEFT says of an embedding LoRA that it saves the embedding too; of lora_bias that it cannot be
# merged into a layer without a bias, and, wrongly, that its tensors are shards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning"),
]

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


@pytest.mark.slow
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
    modules = load_model_base(make_plan(read_spec(path), path.parent))[1]
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
    plain = plain_onnx(world.artifact("blend"))
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
