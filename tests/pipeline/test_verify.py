"""Which base an artifact is of: its digest, and what the files of the base lack."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import Project, write_model_project
from support.home import Home

from loraexport.bases.model import load_model_base
from loraexport.bases.weights import digest_of
from loraexport.cli import app as cli
from loraexport.hf.model import load_plain_model
from loraexport.pipeline.verify import verify_artifact
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.adapters.tensor_files import digest_array
from loraexport_runtime.contract.manifest import Manifest

POOLER = ("pooler.dense.bias", "pooler.dense.weight")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["loraexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def write_without_pooler(folder: Path) -> None:
    """A BERT as those for masked words are published."""
    write_model_project(folder)
    file = folder / "bert/model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name not in POOLER}, file)


def test_a_base_without_pooler_is_known_again(
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And plan, build and manifest name what transformers would draw at random."""
    project = shutil.copytree(home.project(write_without_pooler), tmp_path / "project")
    spec = project / "spec.yaml"
    named = "the base's files lack pooler.dense.bias, pooler.dense.weight: no row needs them"
    assert run(monkeypatch, "plan", spec) == 0
    assert named in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, "plan", spec, "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == list(POOLER)
    assert run(monkeypatch, "build", spec, "--out", project / "artifacts") == 0
    assert named in " ".join(capsys.readouterr().err.split())
    artifact = project / "artifacts/tiny"
    manifest = Manifest.read(artifact)
    assert manifest.base.missing == POOLER
    for base in (None, project / "bert"):
        report = verify_artifact(artifact, manifest, base)
        assert (report.status, report.reference) == ("passed", "the float64 model, merged")


def test_the_digest_is_of_what_the_files_have(home: Home, tmp_path: Path) -> None:
    """Alike in two builds, whatever stands for what a file lacks; what it has counts."""
    project = shutil.copytree(home.project(write_without_pooler), tmp_path / "project")

    def digest() -> str:
        return load_model_base(make_plan(read_spec(project / "spec.yaml"), project))[0].digest  # type: ignore[arg-type]

    first = digest()
    assert digest() == first
    shutil.copy(home.project(write_model_project) / "bert/model.safetensors", project / "bert")
    assert digest() != first


@pytest.mark.parametrize("width", [2, 3])
def test_a_head_that_adapters_bring_is_no_part_of_the_base(
    width: int, home: Home, tmp_path: Path
) -> None:
    """However wide it is, the digest is that of the files, and the manifest's list names it."""
    project = shutil.copytree(home.project(write_model_project), tmp_path / "project")
    write_adapter(
        project / "sql",
        {"bert.encoder.layer.0.attention.self.query": (32, 32)},
        config={"modules_to_save": ["classifier"]},
        tensors={
            "base_model.model.classifier.weight": np.ones((width, 32), np.float32),
            "base_model.model.classifier.bias": np.ones(width, np.float32),
        },
    )
    base = {"kind": "transformers", "path": "bert", "task": "sequence-classification"}
    spec = Project(project).spec(base=base, adapters=[{"name": "sql", "path": "sql"}])
    read, _ = load_model_base(make_plan(read_spec(spec), project))  # type: ignore[arg-type]
    assert read.missing == ("classifier.bias", "classifier.weight")
    model = load_plain_model(project / "bert", "feature-extraction", {})
    of_files = {
        f"bert.{name}": digest_array(tensor.numpy()) for name, tensor in model.state_dict().items()
    }
    assert read.digest == digest_of(of_files)
