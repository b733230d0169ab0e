"""Sites that get one tensor share their products, and give what they give apart."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import write_model_project

import loraexport.model_plan as model_plan
import loraexport_runtime
from loraexport.pipeline import build
from loraexport.plan import make_plan
from loraexport.spec import read_spec
from loraexport_runtime import ModelSession

INPUTS = {
    "input_ids": np.array([[3, 9, 4, 1], [7, 7, 2, 0], [5, 6, 8, 9]]),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
    "token_type_ids": np.zeros((3, 4), np.int64),
}
EVERYWHERE: dict[str, Any] = {"sites": "all-linear", "export": {"formats": ["onnx"]}}
_share = model_plan.share_inputs


def _apart(skeleton: Any, lora: Collection[str], heads: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(site,) for group in _share(skeleton, lora, heads) for site in group]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same spec with shared products and without."""
    found = {}
    for name, share in (("fused", _share), ("apart", _apart)):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_plan, "share_inputs", share)
            found[name] = build(write_model_project(folder, **EVERYWHERE), folder / "out")[0]
    return found


def test_fused_sites_give_what_they_give_apart(artifacts: dict[str, Path]) -> None:
    outputs = {}
    for name, artifact in artifacts.items():
        session = loraexport_runtime.load(artifact, threads=1)
        assert isinstance(session, ModelSession)
        y = session.run(INPUTS, adapters=["sql", None, "chat"])["last_hidden_state"]
        outputs[name] = y[INPUTS["attention_mask"] == 1]
    np.testing.assert_allclose(outputs["fused"], outputs["apart"], rtol=1e-5, atol=1e-5)


def test_three_sites_take_one_shrink_and_one_base_product(artifacts: dict[str, Path]) -> None:
    products = {}
    for name, artifact in artifacts.items():
        graph = onnx.load(artifact / "graphs/model.onnx").graph
        kinds = [node.op_type for node in graph.node]
        products[name] = kinds.count("Gemm") + kinds.count("MatMul")
    # Two layers; q, k and v each had a shrink, and a product of base and expand (augmented).
    assert products["apart"] - products["fused"] == 2 * 2 * (3 - 1)


def test_the_plan_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from loraexport.plan_view import plan_dict, print_plan

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


def test_every_strategy_serves_fused_sites(tmp_path: Path) -> None:
    for strategy in ("segmented", "augmented", "chunked"):
        export = {"formats": ["onnx"], "strategy": strategy}
        spec = write_model_project(tmp_path / strategy, **(EVERYWHERE | {"export": export}))
        folder, report = build(spec, tmp_path / "out")
        assert report.status == "passed"
        layers = json.loads((folder / "manifest.json").read_text())["layers"]
        assert {(len(one["slices"]), one["strategy"]) for one in layers} >= {(3, strategy)}
