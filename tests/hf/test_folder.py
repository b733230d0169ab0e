"""A base's directory that asks for code, for other weights or for other files than a model's."""

import io
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support.builds import write_model_project
from support.home import Home
from tokenizers import Tokenizer, models

from loraexport.cli.app import main
from loraexport.errors import BaseModelError, LoraexportError
from loraexport.hf.folder import read_values
from loraexport.hf.model import load_plain_model
from loraexport.hf.skeleton import read_skeleton
from loraexport.hf.tokenizer import drop_code, find_files, require_tokenizer, write_tokenizer
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec

TASK = "feature-extraction"


@pytest.fixture
def project(home: Home, tmp_path: Path) -> Path:
    source = home.project(write_model_project)
    return shutil.copytree(source, tmp_path / "project", ignore=shutil.ignore_patterns("artifacts"))


def change(base: Path, name: str = "config.json", **values: Any) -> None:
    file = base / name
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(data | values))


class Asked(io.TextIOBase):
    """A terminal that answers yes, and fails the test as well."""

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
        raise AssertionError("stdin was read")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "command", ["plan", "build", "init", "verify", "verify --base", "tokenizer"]
)
def test_code_of_a_base_is_neither_asked_for_nor_run(
    project: Path,
    command: str,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, written = project / "bert", project / "written"
    code = f"open({str(written)!r}, 'w').close()\n"
    (base / "own.py").write_text(code + "class Own:\n    pass\n")
    auto_map: dict[str, Any] = {"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    monkeypatch.setattr(sys, "stdin", Asked())
    if command.startswith("verify"):
        shutil.copytree(home.artifact(write_model_project), project / "artifact")
    if command == "tokenizer":
        (base / "vocab.txt").write_text("[UNK]\nhello\n")
        change(base, model_type="custom-bert")
        change(base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
        said = write_tokenizer(base, project / "out/tokenizer.json") or ""
        assert "is code of the base's own" in said
    else:
        change(base, auto_map=auto_map)
        if command == "verify":  # it looks for its base from here
            monkeypatch.chdir(project)
        arguments: dict[str, list[object]] = {
            "plan": ["plan", project / "spec.yaml"],
            "build": ["build", project / "spec.yaml", "--out", project / "out"],
            "init": [
                "init",
                "--base",
                base,
                "--adapter",
                project / "sql",
                "--out",
                project / "new.yaml",
            ],
            "verify": ["verify", project / "artifact", "--providers", "cpu", "--json"],
            "verify --base": ["verify", project / "artifact", "--base", base],
        }
        monkeypatch.setattr("sys.argv", ["loraexport", *map(str, arguments[command])])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == (0 if command == "verify" else 4)
        printed = capsys.readouterr()
        said = " ".join((printed.out + printed.err).split())
        assert "auto_map names code of the base's own" in said
    assert "[y/N]" not in said
    assert not written.exists()


PHI3 = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
"""As microsoft/Phi-3-mini-4k-instruct and its kin are published."""


@pytest.mark.parametrize(
    ("model_type", "auto_map"),
    [
        ("phi3", PHI3),
        ("phi3", {key: f"microsoft/Phi-3.5-mini-instruct--{name}" for key, name in PHI3.items()}),
        ("phi3", PHI3 | {"AutoTokenizer": "Xenova/gpt-4o"}),
        ("bert", {}),
    ],
)
def test_classes_that_transformers_has_too(
    model_type: str, auto_map: dict[str, str], tmp_path: Path
) -> None:
    values = {"model_type": model_type, "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_values(tmp_path) == values


@pytest.mark.parametrize(
    ("model_type", "auto_map", "named"),
    [
        ("phi3small", PHI3, "configuration_phi3.Phi3Config, modeling_phi3.Phi3ForCausalLM"),
        ("phi3", PHI3 | {"AutoModel": "modeling_phi3.Phi3Bidirectional"}, "Phi3Bidirectional'"),
        ("phi3", PHI3 | {"AutoConfig": "modeling_phi3.Phi3ForCausalLM"}, "('modeling_phi3."),
        ("phi3", {"AutoConfig": "else/x--configuration_phi3.Phi3Config"}, "('else/x--configurat"),
        (["phi3"], PHI3, "configuration_phi3.Phi3Config"),
        ("phi3", ["modeling_phi3.Phi3ForCausalLM"], "modeling_phi3.Phi3ForCausalLM"),
    ],
)
def test_classes_that_may_compute_something_else(
    model_type: Any, auto_map: Any, named: str, tmp_path: Path
) -> None:
    values = {"model_type": model_type, "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(BaseModelError, match="auto_map names code of the base's own") as caught:
        read_values(tmp_path)
    assert named in str(caught.value)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["own.Own", None]}, ["own.Own", None]])
def test_a_tokenizer_of_the_bases_own_leaves_tokenizer_json(
    auto_map: Any, project: Path, tmp_path: Path
) -> None:
    """The copy in an artifact asks nobody to run the class."""
    base = project / "bert"
    change(base, "tokenizer_config.json", auto_map=auto_map, model_max_length=8)
    (base / "vocab.txt").write_text("[UNK]\nhello\n")
    with pytest.raises(BaseModelError, match=r"no tokenizer\.json, .* is code of the base's own"):
        require_tokenizer(base)
    Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")).save(str(base / "tokenizer.json"))
    require_tokenizer(base)
    drop_code(shutil.copytree(base, tmp_path / "copy"))
    kept = json.loads((tmp_path / "copy/tokenizer_config.json").read_text())
    assert kept == {"model_max_length": 8}


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_processor_of_the_bases_own(name: str, project: Path) -> None:
    change(project / "bert", name, auto_map={"AutoImageProcessor": "own.Processor"})
    with pytest.raises(BaseModelError, match=rf"{name}: auto_map names code .*'own\.Processor'"):
        make_plan(read_spec(project / "spec.yaml"), project)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"architectures": ["NewModel"]}, "'NewModel', which is no class of transformers"),
        ({"architectures": ["GPT2Model"]}, "'GPT2Model', but model_type is 'bert', another"),
        ({"architectures": "BertModel"}, "architectures: expected a list of texts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the checkpoint is quantised"),
        ({"transformers_weights": "pytorch_model.bin"}, "it names a file of weights"),
        ({"fusion_config": {"a": 1}}, "exchange modules for others"),
        ({"text_config": {"auto_map": {"AutoModel": "x--own.Own"}}}, "auto_map names code"),
    ],
)
def test_another_model_than_the_directory_says(
    project: Path, values: dict[str, Any], expected: str
) -> None:
    change(project / "bert", **values)
    with pytest.raises(BaseModelError, match=r"config\.json: ") as caught:
        read_skeleton(project / "bert", TASK, "float32")
    assert expected in str(caught.value)


def test_an_adapter_inside_the_base(project: Path) -> None:
    shutil.copy(project / "sql/adapter_config.json", project / "bert")
    with pytest.raises(BaseModelError, match="would load that adapter too"):
        read_skeleton(project / "bert", TASK, "float32")


def test_fewer_layers_than_the_checkpoint_has(project: Path) -> None:
    change(project / "bert", num_hidden_layers=1)
    with pytest.raises(BaseModelError, match=r"asks for fewer layers .*encoder\.layer\.1\."):
        load_plain_model(project / "bert", TASK, {})


def test_quantised_weights(project: Path) -> None:
    file = project / "bert/model.safetensors"
    weights = load_file(file)
    name = "encoder.layer.0.output.dense.weight"
    save_file(weights | {name: weights[name].astype(np.int8)}, file)
    with pytest.raises(BaseModelError, match=f"'{name}' is I8: the checkpoint is quantised"):
        load_plain_model(project / "bert", TASK, {})


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "model.weights", "../model.bin", "a\0b", 3])
def test_shards_that_are_no_safetensors_reach_no_unpickler(
    project: Path, shard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpickle(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr("torch.load", unpickle)
    base = project / "bert"
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    shutil.copy(base / "pytorch_model.bin", base / "model.weights")
    names = dict.fromkeys(load_file(base / "model.weights"), shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BaseModelError, match=r"index\.json: "):
        load_plain_model(base, TASK, {})


def test_an_index_beside_a_single_file_has_no_part(project: Path) -> None:
    base = project / "bert"
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.bin"}}')
    load_plain_model(base, TASK, {})


def make_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened, chdir(file.parent):
        opened.bind(file.name)  # its path may be too long for a socket's


MAKERS: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "device": lambda file: file.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "chat_template.jinja",
    ],
)
def test_what_is_no_file(project: Path, name: str, kind: str) -> None:
    (project / "bert" / name).unlink(missing_ok=True)
    MAKERS[kind](project / "bert" / name)
    with pytest.raises(BaseModelError, match="not a regular file"):
        make_plan(read_spec(project / "spec.yaml"), project)
    with pytest.raises(BaseModelError, match="not a regular file"):
        find_files(project / "bert")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
)
def test_a_regular_file_that_no_read_succeeds_on(project: Path, name: str) -> None:
    (project / "bert" / name).unlink(missing_ok=True)
    (project / "bert" / name).symlink_to("/proc/self/mem")
    with pytest.raises(LoraexportError, match=name):
        make_plan(read_spec(project / "spec.yaml"), project)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.txt", "special_tokens_map.json"])
def test_a_link_out_of_the_base_is_not_copied(project: Path, name: str) -> None:
    outside = project / "secret"
    outside.write_text('{"secret": 1}')
    (project / "bert" / name).symlink_to(outside)
    with pytest.raises(BaseModelError, match=f"{name}: a link out of the base's folder"):
        find_files(project / "bert")


def test_links_inside_a_base_and_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/c0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/1")
    (snapshot / "special_tokens_map.json").symlink_to("tokenizer_config.json")
    assert len(find_files(snapshot)) == 2


def test_code_and_huge_files_are_not_copied(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "bert/tokenizer.py").write_text("raise SystemExit")
    assert find_files(project / "bert") == []
    (project / "bert/tokenizer.model").write_bytes(b"123")
    monkeypatch.setattr("loraexport.hf.folder._MAX_COPIED", 2)
    with pytest.raises(BaseModelError, match=r"tokenizer\.model: 3 bytes, and an artifact gets a"):
        find_files(project / "bert")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pooler.dense.weight", None),
        (
            "encoder.layer.1.output.dense.bias",
            "1 weights are missing for task 'feature-extraction'",
        ),
        (
            "embeddings.LayerNorm.weight",
            "first 'embeddings.LayerNorm.weight'; the checkpoint is of",
        ),
    ],
)
def test_a_plan_tells_which_weights_are_missing(
    project: Path, name: str, expected: str | None, sharded: bool
) -> None:
    """And a load, which reads them, says the same."""
    base = project / "bert"
    weights = load_file(base / "model.safetensors")
    del weights[name]
    save_file(weights, base / "model.safetensors")
    if sharded:
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        shards = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": shards}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = read_spec(project / "spec.yaml")
    if expected is None:
        assert make_plan(spec, project).missing == (name,)
        load_plain_model(base, TASK, {})
        return
    for read in (lambda: make_plan(spec, project), lambda: load_plain_model(base, TASK, {})):
        with pytest.raises(BaseModelError, match=expected):
            read()


def test_what_a_class_lets_be_missing_is_drawn_alike(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the caller's own draws go on as if nothing had been drawn."""
    base, name = project / "bert", "encoder.layer.1.output.dense.weight"
    monkeypatch.setattr(transformers.BertModel, "_keys_to_ignore_on_load_missing", [name])
    weights = load_file(base / "model.safetensors")
    del weights[name]
    save_file(weights, base / "model.safetensors")
    drawn, followed = [], []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(load_plain_model(base, TASK, {}).get_parameter(name))
        followed.append(torch.rand(1).item())
    assert drawn[0].std() > 0
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    torch.manual_seed(1)
    assert followed[0] == followed[2] == torch.rand(1).item()


def test_a_weight_of_another_shape(project: Path) -> None:
    change(project / "bert", vocab_size=50)
    with pytest.raises(
        BaseModelError, match=r"word_embeddings.* \[60, 32\] in the checkpoint, and"
    ):
        make_plan(read_spec(project / "spec.yaml"), project)


def test_a_plan_sees_fewer_layers_and_quantised_weights(project: Path) -> None:
    spec, file = read_spec(project / "spec.yaml"), project / "bert/model.safetensors"
    weights = load_file(file)
    extra = {name.replace("layer.1", "layer.2"): value.copy() for name, value in weights.items()}
    save_file(extra | weights, file)
    with pytest.raises(BaseModelError, match=r"asks for fewer layers .*encoder\.layer\.2\."):
        make_plan(spec, project)
    name = "encoder.layer.0.output.dense.weight"
    save_file(weights | {name: weights[name].astype(np.int8)}, file)
    with pytest.raises(BaseModelError, match=f"'{name}' is I8: the checkpoint is quantised"):
        make_plan(spec, project)
