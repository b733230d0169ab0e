"""`loraexport init` writes a spec that plans and builds as it stands."""

import json
from pathlib import Path

import pytest
from support.adapters import write_adapter
from support.builds import Project, write_model_project
from support.decoders import ADAPTERS, FAMILIES, write_decoder
from support.families import CAUSAL, write_model
from support.families import FAMILIES as MODELS
from support.sentences import Module, declare, pooling
from typer.testing import CliRunner

from loraexport.cli.app import app
from loraexport.errors import BaseModelError, UsageError
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.plan.starter import find_task, write_spec
from loraexport.spec.reader import json_schema, read_spec
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
    assert artifact.name == "mine"  # as the file is called
    assert "slots: 8 #" in text
    assert json.loads((path.parent / "spec.schema.json").read_text()) == json_schema()
    assert report.status == "passed"


def test_a_decoder_generates(tmp_path: Path) -> None:
    write_decoder(tmp_path, FAMILIES["Phi-2"]).unlink()
    path = tmp_path / "spec.yaml"
    spec = write_spec(str(tmp_path / "base"), [tmp_path / name for name in ADAPTERS], path)
    assert spec.base.kind == "causal_lm"
    assert spec.slots == 8
    text = path.read_text()
    assert "task:" not in text
    assert "  # weights: int4 #" in text
    plan = make_plan(spec, tmp_path)
    assert plan.kind.tag == "decoder"
    slices = [[part.name for part in layer.layer.slices] for layer in plan.layers]
    assert slices[0] == ["q_proj", "k_proj", "v_proj", "fc1"]  # a parallel block


def test_another_decoder_is_a_whole_model(tmp_path: Path) -> None:
    """GPT-NeoX, which onnxruntime-genai's builder does not know."""
    write_model(MODELS["GPT-NeoX"], CAUSAL, tmp_path)
    spec = write_spec(str(tmp_path / "base"), [tmp_path / "first"], tmp_path / "spec.yaml")
    assert spec.base.kind == "transformers"
    assert spec.base.task == "causal-lm"


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
    with pytest.raises(UsageError, match=r"'my sql' is no name .* give it one: --adapter NAME=/"):
        write_spec(str(folder / "bert"), [folder / "my sql"], path)
    with pytest.raises(BaseModelError, match="no such directory"):
        write_spec("./nowhere", [folder / "sql"], path)
    with pytest.raises(UsageError, match=r"nowhere: no such folder; make it"):
        write_spec(str(folder / "bert"), [folder / "chat"], folder / "nowhere/spec.yaml")
    assert not path.exists()
    with pytest.raises(UsageError, match="is no name for an adapter"):
        write_spec(str(folder / "bert"), [f"sql\n={folder / 'chat'}"], path)
    assert not path.with_name("spec.schema.json").exists()


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


def test_the_artifact_is_named_after_the_base(folder: Path) -> None:
    (folder / "bert").rename(folder / "_My Bert (v2)")
    base = str(folder / "_My Bert (v2)")
    (folder / "spec.schema.json").write_text("{}")
    spec = write_spec(base, [folder / "sql"], folder / "spec.yaml")
    assert (spec.name, spec.slots) == ("My-Bert-v2-", 8)
    assert (folder / "spec.schema.json").read_text() == "{}"  # whose ever it is
    many = [f"a{index}={folder / 'sql'}" for index in range(9)]
    assert write_spec(base, many, folder / "many tenants.yaml").slots == 9


def test_two_folders_of_one_name(folder: Path) -> None:
    for name in ("sql", "chat"):
        (folder / f"runs/{name}").mkdir(parents=True)
        (folder / name).rename(folder / f"runs/{name}/checkpoint-500")
    sql, chat = (folder / f"runs/{name}/checkpoint-500" for name in ("sql", "chat"))
    path = folder / "spec.yaml"
    with pytest.raises(UsageError, match=r"two adapters are named 'checkpoint-500', .* NAME=/"):
        write_spec(str(folder / "bert"), [sql, chat], path)
    arguments = ["init", "--base", str(folder / "bert"), "--out", str(path)]
    arguments += ["--adapter", f"sql={sql}", "--adapter", f"chat={chat}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert [adapter.name for adapter in make_plan(read_spec(path), folder).adapters] == [
        "sql",
        "chat",
    ]


@pytest.mark.parametrize(
    ("architecture", "task", "expected"),
    [
        ("BertForSequenceClassification", "token-classification", "sequence-classification"),
        ("BertForTokenClassification", "sequence-classification", "token-classification"),
        ("ViTForImageClassification", "sequence-classification", "image-classification"),
    ],
)
def test_a_classifier_of_another_kind_is_refused(
    folder: Path, architecture: str, task: str, expected: str
) -> None:
    """Both heads are called `classifier`, so that transformers loads one as the other."""
    config = json.loads((folder / "bert/config.json").read_text())
    (folder / "bert/config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    base = {"kind": "transformers", "path": "bert", "task": task}
    spec = Project(folder).spec(base=base)
    with pytest.raises(BaseModelError, match=f"it is a {architecture}, .* give task: {expected}"):
        make_plan(read_spec(spec), folder)


def test_a_whole_model_without_weights_or_with_a_broken_tokenizer(folder: Path) -> None:
    """Neither is copied or read by a plan, and both would end a build."""
    (folder / "bert/tokenizer.json").write_text("{")
    path = folder / "spec.yaml"
    with pytest.raises(BaseModelError, match=r"tokenizer\.json: not JSON"):
        write_spec(str(folder / "bert"), [folder / "sql"], path)
    (folder / "bert/model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no safetensors file here"):
        write_spec(str(folder / "bert"), [folder / "sql"], path)
    assert not path.exists()


def test_a_plan_reads_what_init_wrote(folder: Path) -> None:
    spec = write_spec(str(folder / "bert"), [folder / "sql"], folder / "spec.yaml")
    assert [one.name for one in make_plan(spec, folder).adapters] == ["sql"]


def test_a_sentence_encoder_that_cannot_be_built_is_said(folder: Path) -> None:
    declare(folder / "bert", pooling(32, "mean"), Module("CNN", {}))
    with pytest.raises(BaseModelError, match=r"modules\.json lists 'CNN', which cannot be built"):
        write_spec(str(folder / "bert"), [folder / "sql"], folder / "spec.yaml")
    assert not (folder / "spec.yaml").exists()


def test_a_cross_encoder_is_a_classifier(folder: Path) -> None:
    declare(folder / "bert", model_type="CrossEncoder")
    assert find_task(folder / "bert") == "sequence-classification"
