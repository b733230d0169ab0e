"""Each file of others that a build reads, broken in every way: exit code 4, and nothing is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.adapters import write_adapter
from support.builds import Project, write_graph, write_model_project
from support.decoders import FAMILIES, write_decoder, write_genai, write_tokenizer
from support.models import write_base

from loraexport.cli.app import main

INDEX = "model.safetensors.index.json"
KINDS = {
    "layers": "base",
    "model": "bert",
    "decoder": "base",
    "graph": "graph",
    "genai": "genai",
}
"""Each kind of base, a folder of onnxruntime-genai for itself, and where its files are."""
WAYS: dict[str, bytes | None] = {
    "cut off": b'{"a": [1, ',
    "a number": b"7",
    "a text": b'"model"',
    "binary": bytes(range(256)) * 4,
    "empty": b"",
    "nested deeply": b"[" * 200_000,
    "a folder": None,
}
FILES = {
    "layers": (INDEX,),
    "model": ("config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"),
    "decoder": ("config.json", "tokenizer.json", "tokenizer_config.json"),
    "graph": ("config.json", "tokenizer_config.json", "special_tokens_map.json"),
    "genai": ("genai_config.json", "tokenizer.json"),
}
"""JSON that a build reads; what a name stands for is tried in one kind if all read it alike."""


def write_layers(folder: Path) -> None:
    write_base(folder / "base")
    write_adapter(folder / "sql", {"blocks.0.up": (32, 48)}, rank=2)
    (folder / "base/model.safetensors").rename(folder / "base/shard.safetensors")
    names = {"blocks.0.up.weight": "shard.safetensors"}
    (folder / "base" / INDEX).write_text(json.dumps({"weight_map": names}))
    layers = [{"name": "up", "type": "linear", "site": "blocks.0.up"}]
    base = {"kind": "layers", "path": "base", "layers": layers}
    Project(folder).spec(base=base, adapters=[{"name": "sql", "path": "sql"}])


def write_model(folder: Path) -> None:
    """A sentence encoder with a tokenizer."""
    task = {"kind": "transformers", "path": "bert", "task": "sentence-embedding"}
    write_model_project(folder, base=task)
    write_tokenizer(folder / "bert")
    kinds = ("Transformer", "Pooling")
    modules = [
        {"idx": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, ("", "1_Pooling"), strict=True))
    ]
    (folder / "bert/modules.json").write_text(json.dumps(modules))
    (folder / "bert/1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "bert/1_Pooling/config.json").write_text(json.dumps(pooling))


def write_graph_of_texts(folder: Path) -> None:
    """A graph with a tokenizer beside it."""
    write_graph(folder)
    write_tokenizer(folder / "graph")
    (folder / "graph/special_tokens_map.json").write_text("{}")


WRITERS: dict[str, Callable[[Path], object]] = {
    "layers": write_layers,
    "model": write_model,
    "decoder": lambda folder: write_decoder(folder, FAMILIES["Llama"]),
    "graph": write_graph_of_texts,
    "genai": write_genai,
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            WRITERS[kind](made[kind])
        return made[kind]

    return make


class Attack:
    """A copy of a project, and what a build of it says."""

    def __init__(
        self, source: Path, folder: Path, base: str, monkeypatch: Any, capsys: Any
    ) -> None:
        self.folder = shutil.copytree(source, folder / "project")
        self.base = self.folder / base
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def build(self) -> tuple[int, str]:
        """(exit code, the error's lines)"""
        arguments = ["build", self.folder / "spec.yaml", "--out", self.folder / "out", "--json"]
        self._monkeypatch.setattr("sys.argv", ["loraexport", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), self._capsys.readouterr().err

    def refused(self, *names: str) -> str:
        """The error of a build that refuses the base and leaves nothing; it names all of these."""
        code, said = self.build()
        assert code == 4, said
        assert "Traceback" not in said
        for name in names:
            assert name in said
        out = self.folder / "out"
        left = {path.name for path in out.iterdir()} if out.exists() else set()
        assert left <= {".tiny.lock"}, left
        return said

    def put(self, name: str, data: bytes | None) -> None:
        """Write a file anew; None: a folder in its place."""
        file = self.base / name
        if file.exists():
            file.unlink()
        if data is None:
            file.mkdir()
        else:
            file.write_bytes(data)

    def change(self, name: str, path: str, value: Any) -> None:
        """Set a key of a JSON file, given by a dotted path; `...` removes it."""
        data = json.loads((self.base / name).read_text())
        *parents, last = path.split(".")
        place = data
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        (self.base / name).write_text(json.dumps(data))


@pytest.fixture
def attack(
    projects: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], Attack]:
    return lambda kind: Attack(projects(kind), tmp_path, KINDS[kind], monkeypatch, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_it_builds(attack: Callable[[str], Attack], kind: str) -> None:
    """So that it is the broken file which is refused below."""
    code, said = attack(kind).build()
    assert (code, said) == (0, "")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names]
)
def test_a_broken_file(attack: Callable[[str], Attack], kind: str, name: str, way: str) -> None:
    project = attack(kind)
    project.put(name, WAYS[way])
    said = project.refused(str(project.base / name))
    assert said.count("\n") == 1, "one readable block"


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("layers", INDEX, "weight_map", ["shard.safetensors"]),
        ("layers", INDEX, "weight_map", ...),
        ("layers", INDEX, "weight_map", {"blocks.0.up.weight": 5}),
        ("layers", INDEX, "weight_map", {"blocks.0.up.weight": "../shard.safetensors"}),
        ("model", "config.json", "model_type", ...),
        ("model", "config.json", "model_type", "nope"),
        ("model", "config.json", "model_type", ["bert"]),
        ("model", "config.json", "hidden_size", "thirty-two"),
        ("model", "config.json", "hidden_size", None),
        ("model", "config.json", "hidden_size", -3),
        ("model", "config.json", "num_attention_heads", 0),
        ("model", "config.json", "num_hidden_layers", 1e9),
        ("model", "config.json", "hidden_act", "nope"),
        ("model", "modules.json", "1.type", 3),
        ("model", "modules.json", "1.type", ...),
        ("model", "modules.json", "1.path", 3),
        ("model", "modules.json", "1.path", "../../elsewhere"),
        ("model", "modules.json", "1.path", "missing"),
        ("model", "1_Pooling/config.json", "pooling_mode_mean_tokens", "yes"),
        ("model", "1_Pooling/config.json", "pooling_mode_mean_tokens", ...),
        ("model", "1_Pooling/config.json", "pooling_mode", {"mean": 1}),
        ("model", "1_Pooling/config.json", "include_prompt", 0),
        ("model", "1_Pooling/config.json", "word_embedding_dimension", 2**70),
        ("model", "modules.json", "1.type", "custom_code.Pooling"),
        ("model", "tokenizer.json", "model", ...),
        ("model", "tokenizer.json", "model.vocab", []),
        ("decoder", "config.json", "num_key_value_heads", "two"),
        ("decoder", "config.json", "rope_parameters", 5),
        ("decoder", "config.json", "vocab_size", {}),
        ("decoder", "config.json", "eos_token_id", "</s>"),
        ("decoder", "tokenizer.json", "model", {"type": "nope"}),
        ("graph", "config.json", "pad_token_id", "[PAD]"),
        ("graph", "config.json", "vocab_size", [40]),
        ("genai", "genai_config.json", "model", ...),
        ("genai", "genai_config.json", "model", []),
        ("genai", "genai_config.json", "search", ...),
        ("genai", "genai_config.json", "model.decoder", ...),
        ("genai", "genai_config.json", "model.decoder.head_size", ...),
        ("genai", "genai_config.json", "model.decoder.head_size", 0),
        ("genai", "genai_config.json", "model.decoder.num_key_value_heads", "2"),
        ("genai", "genai_config.json", "model.decoder.num_key_value_heads", 3),
        ("genai", "genai_config.json", "model.decoder.num_hidden_layers", 1),
        ("genai", "genai_config.json", "model.decoder.num_hidden_layers", 2**31),
        ("genai", "genai_config.json", "model.decoder.outputs.present_key_names", "%d"),
        ("genai", "genai_config.json", "model.decoder.inputs", "input_ids"),
        ("genai", "genai_config.json", "model.decoder.inputs.past_key_names", "past"),
        ("genai", "genai_config.json", "model.decoder.session_options", []),
        ("genai", "genai_config.json", "model.decoder.filename", 5),
        ("genai", "genai_config.json", "model.eos_token_id", ...),
        ("genai", "genai_config.json", "model.eos_token_id", []),
        ("genai", "genai_config.json", "model.eos_token_id", [True]),
        ("genai", "genai_config.json", "model.bos_token_id", "<s>"),
        ("genai", "genai_config.json", "model.vocab_size", 2.5),
        ("genai", "genai_config.json", "model.context_length", None),
    ],
)
def test_a_key_that_is_wrong(
    attack: Callable[[str], Attack], kind: str, name: str, path: str, value: Any
) -> None:
    project = attack(kind)
    project.change(name, path, value)
    project.refused(str(project.base))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "1_Pooling/config.json", "modules.json"]
)
def test_a_file_that_is_missing(attack: Callable[[str], Attack], name: str) -> None:
    project = attack("model")
    (project.base / name).unlink()
    project.refused(str(project.base))


@pytest.mark.parametrize("way", ["cut off", "binary", "empty", "a folder"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("layers", "shard.safetensors"),
        ("model", "model.safetensors"),
        ("decoder", "model.safetensors"),
        ("graph", "model.onnx"),
        ("graph", "weights.bin"),
        ("genai", "model.onnx"),
        ("genai", "model.onnx.data"),
    ],
)
def test_broken_weights(attack: Callable[[str], Attack], kind: str, name: str, way: str) -> None:
    project = attack(kind)
    project.put(name, WAYS[way])
    project.refused(str(project.base))


def test_weights_that_are_missing(attack: Callable[[str], Attack]) -> None:
    project = attack("graph")
    (project.base / "weights.bin").unlink()
    said = project.refused("weights.bin: no such file; model.onnx keeps weights in it")
    assert said.startswith("BaseModelError: ")


@pytest.mark.parametrize(
    "scopes",
    ["", "[", "{'a': 1}", "5", "[1, 2]", "__import__('os').abort()", "(" * 5000, "\x00"],
    ids=["empty", "cut", "object", "number", "numbers", "code", "nested", "zero"],
)
def test_metadata_of_a_graph(attack: Callable[[str], Attack], scopes: str) -> None:
    project = attack("graph")
    graph = onnx.load(project.base / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    onnx.save(graph, project.base / "model.onnx")
    project.refused("node '/q/MatMul': its metadata 'pkg.torch.onnx.name_scopes' is no list")
