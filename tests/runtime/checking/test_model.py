"""The command on a whole model: blends and both paddings, and faults in the graph's own weights."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.builds import write_model_project
from support.checks import run_check, scale_adapter, swap_slots

from loraexport.pipeline.build import build
from loraexport_runtime import ArtifactError
from loraexport_runtime.checking.check import check_artifact
from loraexport_runtime.checking.model import load_reference, make_cases
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.sessions.model import ModelSession


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export = {"formats": ["onnx"], "blend": True}
    return build(write_model_project(folder, export=export), folder / "artifacts")[0]


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """An artifact to change."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def test_it_passes_without_torch(built: Path) -> None:
    done = run_check("check", built, "--providers", "cpu", "--json")
    assert (done.code, done.err) == (0, "")
    rows = done.data["rows"]
    assert {row["adapter"] for row in rows} == {"base", "sql", "chat", "blend"}
    assert {(row["implementation"], row["layer"], row["site"]) for row in rows} == {
        ("onnx-cpu", "feature-extraction", "last_hidden_state")
    }
    assert all(row["passed"] and row["error"] < 1e-5 for row in rows)
    assert (done.data["status"], done.data["parity"]) == ("passed", "passed")


def test_every_stored_case_runs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as itself, and with the base alone."""
    run, batches = ModelSession.run, []

    def counted(self: ModelSession, inputs: Any, adapters: Any = None) -> Any:
        batches.append(adapters)
        return run(self, inputs, adapters)

    monkeypatch.setattr(ModelSession, "run", counted)
    assert check_artifact(built, ["cpu"]).status == "passed"
    manifest = Manifest.read(built)
    assert isinstance(manifest.kind, Model)
    names = {case.name for case in make_cases(manifest, manifest.kind)}
    stored = load_reference(built, manifest, manifest.kind)
    assert set(stored.expected) == names
    assert {"alone-sql", "alone-chat", "mixed", "mixed-left", "base-only", "blend"} < names
    assert len(batches) == 2 * len(names)
    assert {"sql": 0.75} in [row for batch in batches for row in batch]


def test_another_adapter_fails(artifact: Path) -> None:
    scale_adapter(artifact, "sql", 1.05)
    done = run_check("check", artifact, "--providers", "cpu")
    assert done.code == 3
    assert "adapter 'sql', case '" in done.err or "adapter 'blend', case 'blend'" in done.err
    failed = {row.adapter for row in check_artifact(artifact, ["cpu"]).failures}
    assert failed == {"sql", "blend"}


def test_slots_in_another_order_fail(artifact: Path) -> None:
    swap_slots(artifact)
    report = check_artifact(artifact, ["cpu"])
    assert report.status == "failed"
    mixed = {"mixed", "mixed-left", "one-row", "blend"}
    assert {row.worst_case for row in report.failures} <= mixed


def test_cases_of_another_model(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    model = manifest.kind
    assert isinstance(model, Model)
    pooled = replace(model, outputs=(replace(model.outputs[0], name="pooled"),))
    with pytest.raises(ArtifactError, match="'alone-sql/y/pooled' is missing, so these are not"):
        load_reference(artifact, manifest, pooled)
    wider = replace(model, outputs=(replace(model.outputs[0], shape=("batch", "sequence", "48")),))
    with pytest.raises(ArtifactError, match=r"has shape \[2, 10, 32\], so these are not the cases"):
        load_reference(artifact, manifest, wider)
