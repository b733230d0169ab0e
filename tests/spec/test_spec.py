"""YAML -> Spec: what is read, and every problem at once."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.builds import Project
from support.specs import GOOD, problems, read

from loraexport.errors import SpecError
from loraexport.spec.reader import json_schema, read_spec

ROOT = Path(__file__).resolve().parents[2]
SPECS = sorted((ROOT / "specs").glob("*.yaml"))


def test_good_spec_and_its_defaults(tmp_path: Path) -> None:
    spec = read(tmp_path, GOOD)
    assert (spec.name, spec.slots, spec.max_rank) == ("tiny", None, None)
    assert spec.formats == ("torchscript", "onnx")
    assert (spec.export.strategy, spec.export.tune.device) == ("auto", "cuda")
    assert spec.adapters[0].scale == 1.0
    assert spec.parity.onnx == "required"


def test_spec_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        read(tmp_path, GOOD).name = "other"  # type: ignore[misc]


# ---------------------------------------------------------------- one problem at a time


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # keys
        ("name: tiny", "nmae: tiny", "2: nmae: unknown key (did you mean 'name'?)"),
        ("  path: base", "  paht: base", "5: base.paht: unknown key (did you mean 'path'?)"),
        (
            "      site:",
            "      sites:",
            "9: base.layers[0].sites: unknown key (did you mean 'site'?)",
        ),
        (
            "path: sql}",
            "path: sql, scael: 2}",
            "11: adapters[0].scael: unknown key (did you mean 'scale'?)",
        ),
        (
            "path: sql}",
            "path: sql, zzz: 2}",
            "11: adapters[0].zzz: unknown key (remove it; 'loraexport schema' lists the keys)",
        ),
        (
            "version: 1\n",
            "version: 1\nmagic: [dora]\n",
            "2: magic: unknown key (remove it; 'loraexport schema' lists the keys)",
        ),
        (
            "version: 1\n",
            "version: 1\nfeature: [dora]\n",
            "2: feature: unknown key (did you mean 'features'?)",
        ),
        ("version: 1\n", "", "1: version: required key is missing (add it)"),
        (
            "      type: linear\n",
            "",
            "7: base.layers[0].type: required key is missing (add type: l",
        ),
        (", path: sql}", "}", "11: adapters[0].path: required key is missing (add it)"),
        (
            "  kind: layers\n",
            "",
            "3: base.kind: required key is missing (add kind: layers or kind: transformers or"
            " kind: causal_lm or kind: onnx)",
        ),
        (
            "name: tiny\n",
            "name: tiny\nname: other\n",
            "3: name: duplicate key, first given on line 2 (remove one of the two)",
        ),
        (
            "      site: blocks.0.up\n",
            "      site: blocks.0.up\n      site: blocks.0.up\n",
            "10: base.layers[0].site: duplicate key, first given on line 9",
        ),
        # types
        (
            "name: tiny",
            "name: tiny\nslots: '8'",
            "3: slots: expected integer, got '8' (write it without quotes)",
        ),
        (
            "name: tiny",
            "name: tiny\nslots: 1.5",
            "3: slots: expected integer, got 1.5 (write a whole number, as 16)",
        ),
        ("name: tiny", "name: tiny\nslots: true", "3: slots: expected integer, got true"),
        ("name: tiny", "name: tiny\nslots: 0x10", "3: slots: expected integer, got '0x10' (write"),
        ("name: tiny", "name: tiny\nslots: 0", "3: slots: should be greater than 0, got 0"),
        ("name: tiny", "name: tiny\nslots: [8]", "3: slots: expected integer, got [8]"),
        ("name: tiny", "name: 5", "2: name: expected string, got 5 (put it in quotes)"),
        ("name: tiny", "name: 1e5", "2: name: expected string, got 100000.0 (put it in quotes)"),
        ("name: tiny", "name: true", "2: name: expected string, got true (put it in quotes)"),
        ("name: tiny", "name:", "2: name: expected string, got nothing (give it a value)"),
        (
            "      site: blocks.0.up",
            "      site: a\n      fan_in_fan_out: no",
            "10: base.layers[0].fan_in_fan_out: expected true or false, got 'no' (write true or",
        ),
        (
            "      site: blocks.0.up",
            "      site: a\n      bias: 5",
            "10: base.layers[0].bias: expected string or true or false, got 5",
        ),
        (
            "path: sql}",
            "path: sql, scale: '0.5'}",
            "11: adapters[0].scale: expected number, got '0.5' (write it without quotes)",
        ),
        (
            "path: sql}",
            "path: sql, scale: half}",
            "11: adapters[0].scale: expected number, got 'half' (write a number, as 0.5 or 1e-5)",
        ),
        (
            "path: sql}",
            "path: sql, scale: 1e999}",
            "11: adapters[0].scale: should be a finite number, got inf",
        ),
        (
            "  - {name: sql, path: sql}",
            "  sql: {path: sql}",
            "10: adapters: expected list, got {'sql': {'path': 'sql'}} (start each item with '- ')",
        ),
        (
            "  - {name: sql, path: sql}",
            "  - sql",
            "11: adapters[0]: expected mapping, got 'sql' (write it as key: value)",
        ),
        ("  - {name: sql, path: sql}", "  []", "10: adapters: empty (give at least one)"),
        (
            "name: tiny",
            "name: tiny\nexport:",
            "3: export: expected mapping, got nothing (give it a",
        ),
        # values
        ("version: 1", "version: 2", "1: version: expected 1, got 2"),
        (
            "type: linear",
            "type: conv",
            "8: base.layers[0].type: expected 'linear', 'embedding', got 'conv' (choose one)",
        ),
        (
            "name: tiny",
            "name: tiny\nexport: {dtype: fp16}",
            "3: export.dtype: expected 'float32', 'float16' or 'bfloat16', got 'fp16' (choose one)",
        ),
        (
            "name: tiny",
            "name: tiny\nexport: {formats: [onnx, tensorrt]}",
            "3: export.formats[1]: expected 'torchscript' or 'onnx', got 'tensorrt' (choose one)",
        ),
        (
            "name: tiny",
            "name: ../up",
            "2: name: '../up' is no name (letters, digits, '.', '_', '-'",
        ),
        ("name: tiny", "name: .hidden", "2: name: '.hidden' is no name"),
        ("name: tiny", "name: a b", "2: name: 'a b' is no name"),
        ("name: tiny", "name: ''", "2: name: '' is no name"),
        ("name: tiny", f"name: {'x' * 65}", "2: name: '" + "x" * 56 + "... is no name (letters"),
        ("{name: sql,", "{name: a/b,", "11: adapters[0].name: 'a/b' is no name"),
        ("    - name: up", "    - name: ../up", "7: base.layers[0].name: '../up' is no name"),
        # rules between keys
        (
            "  path: base",
            "  path: base\n  init: {seed: 0}",
            "3: base: give either path or init; both are given (path for real weights",
        ),
        ("  path: base\n", "", "3: base: give either path or init; neither is given (path for"),
        (
            "      site: blocks.0.up",
            "      weight: w\n      slices:\n        - {name: q, site: a}",
            "9: base.layers[0].weight: weight beside slices (move it into each of the slices)",
        ),
        (
            "      site: blocks.0.up",
            "      slices:\n        - {name: q, site: a}\n        - {name: q, site: b}",
            "11: base.layers[0].slices[1].name: two are named 'q', the first on line 10 (give each",
        ),
        (
            "  - {name: sql, path: sql}",
            "  - {name: sql, path: sql}\n  - {name: sql, path: b}",
            "12: adapters[1].name: two are named 'sql', the first on line 11 (give each its own",
        ),
        (
            "  - {name: sql, path: sql}",
            "  - {name: base, path: sql}",
            "11: adapters[0].name: 'base' stands for no adapter (give it another name)",
        ),
        (
            "adapters:",
            "    - {name: up, type: linear, site: b}\nadapters:",
            "10: base.layers[1].name: two are named 'up', the first on line 7 (give each its own",
        ),
    ],
)
def test_one_problem(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) == 1, "the case changes one place"
    found = problems(tmp_path, GOOD.replace(old, new))
    assert any(problem.startswith(expected) for problem in found), found
    mistyped = new.startswith(("nmae", "  paht"))  # the key that was meant is then missing too
    assert len(found) == (2 if mistyped else 1), found


WHOLE = """\
version: 1
name: tiny
base:
  kind: transformers
  path: base
  task: feature-extraction
adapters:
  - {name: sql, path: sql}
"""


def test_features_and_blend_of_a_whole_model(tmp_path: Path) -> None:
    plain = read(tmp_path, WHOLE)
    assert (plain.features, plain.export.blend) == (None, False)
    text = WHOLE + "features: [dora, bias, heads]\nexport: {blend: true, strategy: masked}\n"
    spec = read(tmp_path, text)
    assert (spec.features, spec.export.blend) == (("dora", "bias", "heads"), True)
    assert read(tmp_path, spec.to_yaml()) == spec
    assert read(tmp_path, WHOLE + "features: []\n").features == ()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("features: [dora]", "12: features: for whole models only (remove it, or take the whole"),
        ("features: []", "12: features: for whole models only (remove it"),
        ("sites: all-linear", "12: sites: for whole models only (remove it; every listed layer"),
        ("export: {blend: true}", "12: export.blend: for whole models only (remove it, or take"),
    ],
)
def test_key_of_a_whole_model_beside_layers(tmp_path: Path, line: str, expected: str) -> None:
    (problem,) = problems(tmp_path, f"{GOOD}{line}\n")
    assert problem.startswith(expected)


def test_defaults_written_out_are_no_keys_of_a_whole_model(tmp_path: Path) -> None:
    """The resolved copy in an artifact of layers has them all."""
    spec = read(tmp_path, GOOD)
    assert "blend: false" in spec.to_yaml()
    assert read(tmp_path, spec.to_yaml()) == spec


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "features: [dora, doras]",
            "9: features[1]: expected 'dora', 'bias' or 'heads', got 'doras' (choose one)",
        ),
        ("features: dora", "9: features: expected list, got 'dora' (start each item with '- ')"),
        ("export: {blend: 1}", "9: export.blend: expected true or false, got 1 (write true or"),
        (
            "export: {blend: true, strategy: segmented}",
            "9: export.strategy: 'segmented' cannot blend slots (remove it, or take masked)",
        ),
        (
            "export: {strategy: augmented, blend: true}",
            "9: export.strategy: 'augmented' cannot blend slots (remove it, or take masked)",
        ),
    ],
)
def test_problem_of_a_whole_model(tmp_path: Path, line: str, expected: str) -> None:
    (problem,) = problems(tmp_path, f"{WHOLE}{line}\n")
    assert problem.startswith(expected)


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
version: 1
name: a b
base:
  kind: layers
  layers:
    - {name: q, type: conv}
    - name: q
      type: linear
      in_features: "16"
      slices:
        - {name: a, sit: x}
        - {name: a, site: y, out_features: 2.5}
    - {name: e, type: embedding, slices: []}
adapters:
  - {name: x, path: 5}
  - {name: x, path: y, scale: no}
slots: 2
slots: 3
parity: {tolerance: -1, onnx: later}
"""
    found = problems(tmp_path, text)
    assert [problem.split(": ")[:2] for problem in found] == [
        ["2", "name"],
        ["3", "base"],
        ["6", "base.layers[0].type"],
        ["7", "base.layers[1].name"],
        ["9", "base.layers[1].in_features"],
        ["11", "base.layers[1].slices[0].sit"],
        ["12", "base.layers[1].slices[1].name"],
        ["12", "base.layers[1].slices[1].out_features"],
        ["13", "base.layers[2].slices"],
        ["15", "adapters[0].path"],
        ["16", "adapters[1].name"],
        ["16", "adapters[1].scale"],
        ["18", "slots"],
        ["19", "parity.tolerance"],
        ["19", "parity.onnx"],
    ]


# ---------------------------------------------------------------- scalars


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E+2", 100.0), (".5", 0.5), ("2", 2.0), ("-0.25", -0.25)]
)
def test_numbers(tmp_path: Path, text: str, value: float) -> None:
    spec = read(tmp_path, GOOD.replace("path: sql}", f"path: sql, scale: {text}}}"))
    assert spec.adapters[0].scale == value


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("08", 8), ("+8", 8)])
def test_integers_are_decimal(tmp_path: Path, text: str, value: int) -> None:
    assert read(tmp_path, GOOD.replace("name: tiny", f"name: tiny\nslots: {text}")).slots == value


@pytest.mark.parametrize("name", ["no", "on", "yes", "off", "2020-01-01", "1.2.3", "0x10", "1_0"])
def test_words_stay_text(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, GOOD.replace("tiny", name)).name == name


@pytest.mark.parametrize("name", ["no", "1e5", "08", "010", "8", "true", "null", "2020-01-01"])
def test_resolved_spec_reads_back(tmp_path: Path, name: str) -> None:
    """Names that a reader could take for something else are quoted in the artifact's copy."""
    spec = read(tmp_path, GOOD.replace("tiny", f"'{name}'"))
    again = read(tmp_path, spec.to_yaml())
    assert again == spec
    assert again.digest() == spec.digest()
    assert yaml.safe_load(spec.to_yaml())["name"] == name, "for readers of YAML 1.1 too"


def test_digest_depends_on_the_meaning_alone(tmp_path: Path) -> None:
    digest = read(tmp_path, GOOD).digest()
    assert read(tmp_path, "# a comment\n" + GOOD + "parity: {seed: 0}\n").digest() == digest
    assert read(tmp_path, GOOD + "parity: {seed: 1}\n").digest() != digest


def test_anchors_may_be_used(tmp_path: Path) -> None:
    text = GOOD.replace("{name: sql, path: sql}", "{name: &n sql, path: *n}")
    assert read(tmp_path, text).adapters[0].path == "sql"


# ---------------------------------------------------------------- files that are no spec


def test_missing_file(tmp_path: Path) -> None:
    expected = r"spec\.yaml:1: no such file \(give the path of a spec, as specs/quickstart\.yaml\)"
    with pytest.raises(SpecError, match=expected):
        read_spec(tmp_path / "spec.yaml")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r":1: Is a directory \(give a YAML file"):
        read_spec(tmp_path)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(SpecError, match=r":1: not UTF-8 text: .* \(save it as UTF-8\)"):
        read_spec(tmp_path / "spec.yaml")


def test_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes(GOOD.encode("utf-8-sig"))
    assert read_spec(tmp_path / "spec.yaml").name == "tiny"


# ---------------------------------------------------------------- the JSON Schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_schema_is_json_and_names_its_dialect() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["version", "name", "base", "adapters"]


@pytest.mark.parametrize(
    ("base", "formats"),
    [
        ("kind: transformers, path: base, task: feature-extraction", ["onnx"]),
        ("kind: causal_lm, path: base", ["onnx"]),
        ("kind: onnx, path: base", ["onnx"]),
        ("kind: layers, path: base, layers: [{name: up, type: linear}]", ["torchscript", "onnx"]),
    ],
    ids=["transformers", "causal_lm", "onnx", "layers"],
)
def test_whole_models_are_torchscript_only_when_asked(
    tmp_path: Path, base: str, formats: list[str]
) -> None:
    """The resolved spec says which, so that an artifact's does not follow a later default."""
    text = f"version: 1\nname: tiny\nbase: {{{base}}}\nadapters: [{{name: sql, path: sql}}]\n"
    spec = read(tmp_path, text)
    assert spec.formats == tuple(formats)
    assert yaml.safe_load(spec.to_yaml())["export"]["formats"] == formats
    assert read(tmp_path, spec.to_yaml()).digest() == spec.digest()
    asked = read(tmp_path, f"{text}export: {{formats: [onnx, torchscript]}}\n")
    assert asked.formats == ("onnx", "torchscript")


def test_schema_accepts_what_the_reader_accepts(
    validator: jsonschema.Draft202012Validator, project: Project
) -> None:
    for path in (
        project.spec(),
        project.spec(
            "full.yaml",
            slots=4,
            max_rank=16,
            export={"formats": ["onnx"], "strategy": "masked", "tune": {"device": "cpu"}},
            parity={"tolerance": 1e-4, "onnx": "deferred"},
        ),
    ):
        read_spec(path)
        validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "change",
    [
        {"nmae": "x"},
        {"version": 2},
        {"slots": "8"},
        {"slots": 0},
        {"adapters": [{"name": "a b", "path": "sql"}]},
        {"adapters": []},
        {"adapters": [{"name": "x"}]},
        {"export": {"dtype": "fp16"}},
        {"base": {"kind": "layers", "path": "b", "layers": [{"type": "conv", "name": "x"}]}},
        {"parity": {"tolerance": 0}},
        {"features": ["lora"]},
        {"export": {"blend": "yes"}},
    ],
)
def test_schema_refuses_what_the_reader_refuses(
    validator: jsonschema.Draft202012Validator, project: Project, change: dict[str, Any]
) -> None:
    path = project.spec(**change)
    with pytest.raises(SpecError):
        read_spec(path)
    assert not validator.is_valid(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_shipped_spec(validator: jsonschema.Draft202012Validator, path: Path) -> None:
    read_spec(path)
    validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_shipped_spec_points_at_the_schema(path: Path) -> None:
    first, *rest = path.read_text().splitlines()
    mark = "# yaml-language-server: $schema="
    assert first.startswith(mark), "editors read the first line"
    schema = path.parent / first.removeprefix(mark).strip()
    assert json.loads(schema.read_text()) == json_schema(), "write it with 'loraexport schema'"
    assert rest[0].startswith("#"), "a header comment says what the spec shows"
