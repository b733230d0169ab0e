"""`loraexport init` writes a spec that plans and builds as it stands."""

import json
from pathlib import Path

import pytest
from support.adapters import write_adapter
from support.builds import write_model_project
from typer.testing import CliRunner

from loraexport.cli.app import app
from loraexport.errors import BaseModelError, SpecError, UsageError
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.plan.starter import find_task, write_spec
from loraexport_runtime import AdapterError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_project(tmp_path).unlink()
    return tmp_path


def test_the_spec_builds_as_it_stands(folder: Path) -> None:
    path = folder / "specs/mine.yaml"
    path.parent.mkdir()
    arguments = ["init", "--base", str(folder / "bert"), "--out", str(path)]
    arguments += ["--adapter", str(folder / "sql"), "--adapter", str(folder / "chat")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    text = path.read_text()
    assert "path: ../bert" in text
    assert "task: feature-extraction" in text
    assert "# 2 sites (query, value), rank 2, scaling 4" in text
    assert "# 2 sites (dense, query), rank 4, scaling 4, rsLoRA" in text
    assert str(folder) not in text.replace(str(path), "")
    artifact, report = build(path, folder / "artifacts")
    assert artifact.name == "mine"
    assert report.status == "passed"


def test_it_overwrites_nothing(folder: Path) -> None:
    path = folder / "spec.yaml"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        write_spec(str(folder / "bert"), [folder / "sql"], path)
    assert path.read_text() == "mine"


def test_what_does_not_fit_is_said_and_nothing_written(folder: Path) -> None:
    path = folder / "spec.yaml"
    write_adapter(folder / "other", {"decoder.q": (32, 32)})
    with pytest.raises(AdapterError, match="have no site in this base"):
        write_spec(str(folder / "bert"), [folder / "other"], path)
    with pytest.raises(UsageError, match="two adapters are named 'sql'"):
        write_spec(str(folder / "bert"), [folder / "sql", folder / "sql"], path)
    (folder / "sql").rename(folder / "my sql")
    with pytest.raises(SpecError, match="'my sql' is no name"):
        write_spec(str(folder / "bert"), [folder / "my sql"], path)
    with pytest.raises(BaseModelError, match="no such directory"):
        write_spec("./nowhere", [folder / "sql"], path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "sequence-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("LlamaForCausalLM", "causal-lm"),
        ("ViTForImageClassification", "image-classification"),
        ("CLIPVisionModelWithProjection", "image-embedding"),
        ("CLIPModel", "feature-extraction"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_the_task_is_found(tmp_path: Path, architecture: str, task: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert find_task(tmp_path) == task
    (tmp_path / "modules.json").write_text("[]")
    assert find_task(tmp_path) == "sentence-embedding"


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["none", "open", "list"])
def test_a_directory_that_says_no_task(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        BaseModelError, match=r"config\.json: (no such file|not JSON|expected an object)"
    ):
        find_task(tmp_path)


def test_a_plan_reads_what_init_wrote(folder: Path) -> None:
    spec = write_spec(str(folder / "bert"), [folder / "sql"], folder / "spec.yaml")
    assert [one.name for one in make_plan(spec, folder).adapters] == ["sql"]
