"""artifacts/manifest.schema.json: as the code gives it, and true of real manifests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.contract.json_schema import manifest_schema
from loraexport_runtime.contract.kinds import Graph
from loraexport_runtime.contract.manifest import FORMAT_VERSION, Manifest

ROOT = Path(__file__).parents[3]
FORMAT_4 = ROOT / "tests/regression/format4"


def validate(data: Any) -> None:
    Draft202012Validator(manifest_schema()).validate(data)


def test_the_published_file_is_what_the_code_gives() -> None:
    text = json.dumps(manifest_schema(), indent=2, ensure_ascii=False) + "\n"
    published = (ROOT / "artifacts/manifest.schema.json").read_text(encoding="utf-8")
    command = "python -m loraexport_runtime.contract.json_schema > artifacts/manifest.schema.json"
    assert published == text, f"run {command}"


def test_it_is_a_schema_and_describes_its_fields() -> None:
    schema = manifest_schema()
    Draft202012Validator.check_schema(schema)
    decoder = schema["$defs"]["Decoder"]
    assert decoder["description"].startswith("A decoder with a KV cache, as onnxruntime-genai")
    assert decoder["properties"]["folder"] == {
        "description": "genai_config.json, the graph, and the tokenizer's files.",
        "type": "string",
    }
    assert decoder["required"] == [
        *("folder", "onnx", "blend", "max_length", "vocab_size"),
        *("lengths", "reread_length", "steps"),
    ]


def test_a_manifest_that_a_build_wrote(tenants: Path) -> None:
    validate(json.loads((tenants / MANIFEST_FILE).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["layers", "model", "decoder", "graph"])
def test_every_kind(name: str) -> None:
    manifest = Manifest.read(FORMAT_4 / ("model" if name == "graph" else name))
    if name == "graph":
        assert manifest.kind.tag == "model"
        manifest = replace(manifest, kind=Graph(manifest.kind))
    data = json.loads(replace(manifest, format_version=FORMAT_VERSION).to_json())
    assert list(data["kind"]) == [name]
    validate(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format_version=4),
        lambda data: data.update(extra=1),
        lambda data: data.pop("dtype"),
        lambda data: data.update(kind={}),
        lambda data: data.update(kind={"layers": {}, "decoder": {}}),
        lambda data: data.update(kind={"vision": {}}),
        lambda data: data.update(num_slots="2"),
        lambda data: data["layers"][0].update(strategy="guess"),
        lambda data: data["layers"][0]["stacks"][0].update(shape=[1, 2, 3]),
        lambda data: data["files"]["spec.yaml"].update(size=1.5),
    ],
)
def test_what_the_runtime_refuses_it_refuses(
    change: Callable[[dict[str, Any]], object], tenants: Path
) -> None:
    data = json.loads((tenants / MANIFEST_FILE).read_text(encoding="utf-8"))
    change(data)
    with pytest.raises(ValidationError):
        validate(data)
