"""Sites that get one tensor share their products, and give what they give apart."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.builds import write_model_project

import loraexport.plan.model as model_plan
import loraexport_runtime
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime import ModelSession

INPUTS = {
    "input_ids": np.array([[3, 9, 4, 1], [7, 7, 2, 0], [5, 6, 8, 9]]),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
    "token_type_ids": np.zeros((3, 4), np.int64),
}
EVERYWHERE: dict[str, Any] = {"sites": "all-linear", "export": {"formats": ["onnx"]}}
SCALES = {"sql": 1.0, "chat": 0.5}  # of the specs that conftest writes
BYTES_ALONE = {"device": "one", "launch": 0.0, "gbyte": 1.0, "gflop": 0.0}
_share = model_plan.share_inputs


def _apart(skeleton: Any, lora: Collection[str], heads: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(site,) for group in _share(skeleton, lora, heads) for site in group]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same spec with shared products, with a product for each over one [x | h], and without."""
    found = {}
    tune = {"costs": BYTES_ALONE}
    costs = {"export": {"formats": ["onnx"], "strategy": "augmented", "tune": tune}}
    for name, share, more in (
        ("fused", _share, {}),
        ("beside", _share, costs),
        ("apart", _apart, {}),
    ):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_plan, "share_inputs", share)
            spec = write_model_project(folder, **(EVERYWHERE | more))
            found[name] = build(spec, folder / "out")[0]
    return found


def test_fused_sites_give_what_they_give_apart(artifacts: dict[str, Path]) -> None:
    outputs = {}
    for name, artifact in artifacts.items():
        session = loraexport_runtime.load(artifact, threads=1)
        assert isinstance(session, ModelSession)
        y = session.run(INPUTS, adapters=["sql", None, "chat"])["last_hidden_state"]
        outputs[name] = y[INPUTS["attention_mask"] == 1]
    for name in ("fused", "beside"):
        np.testing.assert_allclose(outputs[name], outputs["apart"], rtol=1e-5, atol=1e-5)


def test_three_sites_take_one_shrink_and_one_base_product(artifacts: dict[str, Path]) -> None:
    products = {}
    for name, artifact in artifacts.items():
        graph = onnx.load(artifact / "graphs/model.onnx").graph
        kinds = [node.op_type for node in graph.node]
        products[name] = kinds.count("Gemm") + kinds.count("MatMul")
        assert kinds.count("Split") == (2 if name == "fused" else 0)
    # Two layers; q, k and v each had a shrink, and a product of base and expand (augmented).
    assert products["apart"] - products["fused"] == 2 * 2 * (3 - 1)
    assert products["apart"] - products["beside"] == 2 * (3 - 1)


def test_an_adapter_is_loaded_into_stacks_side_by_side(artifacts: dict[str, Path]) -> None:
    folder = artifacts["beside"]
    session = loraexport_runtime.load(folder, threads=1)
    assert isinstance(session, ModelSession)
    layer = next(one for one in session.manifest.layers if len(one.slices) == 3)
    b = [stack for stack in layer.stacks if stack.role == "lora_B"]
    assert [stack.columns for stack in b] == [slice(0, 32), slice(32, 64), slice(64, 96)]
    first = session.run(INPUTS, adapters=["sql", None, "chat"])["last_hidden_state"]
    for name in ("sql", "chat"):
        session.unload_adapter(name)
    for name in ("chat", "sql"):  # each in the other's slot
        session.load_adapter(name, folder / "adapters" / name, scale=SCALES[name])
    again = session.run(INPUTS, adapters=["sql", None, "chat"])["last_hidden_state"]
    np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-5)
    base = session.run(INPUTS, adapters=[None] * 3)["last_hidden_state"]
    assert np.abs(base - first)[[0, 2]].max() > 0.01


def test_the_plan_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from loraexport.cli.show_plan import plan_dict, print_plan

    plan = make_plan(read_spec(write_model_project(tmp_path, **EVERYWHERE)), tmp_path)
    fused = "encoder.layer.{}.attention.self.query+key+value"
    sites = {layer["name"]: layer["sites"] for layer in plan_dict(plan)["layers"]}
    for index in range(2):
        own = [f"encoder.layer.{index}.attention.self.{part}" for part in ("query", "key", "value")]
        assert sites[fused.format(index)] == own
    print_plan(plan, Console(width=200))
    shown = capsys.readouterr().out
    assert "one shrink and one base product for all" in shown
    assert f"{fused.format('*')} (2 times)" in shown


def test_only_sites_with_adapters_are_shared(tmp_path: Path) -> None:
    plan = make_plan(read_spec(write_model_project(tmp_path)), tmp_path)
    names = [one.layer.name for one in plan.layers]
    assert "encoder.layer.0.attention.self.query" in names
    assert "encoder.layer.1.attention.self.query+value" in names


def test_a_model_that_cannot_run_without_values_shares_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertModel

    forward = BertModel.forward

    def picky(self: Any, input_ids: Any, **arguments: Any) -> Any:
        if int(input_ids.sum()) < 0:
            raise AssertionError("no text sums to less than 0")
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(BertModel, "forward", picky)
    plan = make_plan(read_spec(write_model_project(tmp_path, **EVERYWHERE)), tmp_path)
    assert all(len(one.layer.slices) == 1 for one in plan.layers)


@pytest.mark.parametrize(
    "strategy",
    [
        "augmented",
        pytest.param("segmented", marks=pytest.mark.slow),
        pytest.param("chunked", marks=pytest.mark.slow),
    ],
)
def test_every_strategy_serves_fused_sites(strategy: str, tmp_path: Path) -> None:
    export: dict[str, Any] = {"formats": ["torchscript", "onnx"], "strategy": strategy}
    export["tune"] = {"costs": BYTES_ALONE}
    spec = write_model_project(tmp_path, **(EVERYWHERE | {"export": export}))
    folder, report = build(spec, tmp_path / "out")
    assert report.status == "passed"
    layers = json.loads((folder / "manifest.json").read_text())["layers"]
    assert {(len(one["slices"]), one["strategy"]) for one in layers} >= {(3, strategy)}
