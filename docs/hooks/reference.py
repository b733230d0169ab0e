"""mkdocs hook: the pages that follow from the code, made at each build and kept nowhere.

`reference/spec.md` comes from the JSON Schema of a spec, `reference/cli.md` from the commands,
`reference/server.md` from the server's settings and its OpenAPI document.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from loraexport.cli.app import app
from loraexport.spec.reader import json_schema
from loraexport_serve.app import describe
from loraexport_serve.config.schema import ModelSettings, Settings

Schema = Mapping[str, Any]
# Where a reader of a spec meets them, outermost first.
ORDER = (
    *("LayersSpec", "LinearSpec", "SliceSpec", "EmbeddingSpec", "InitSpec", "TransformersSpec"),
    *("CausalLmSpec", "OnnxSpec", "SiteRule", "AdapterSpec", "ExportSpec", "TuneSpec", "Costs"),
    *("CostTerms", "ParitySpec"),
)
TITLES = {
    "LayersSpec": "base, kind: layers",
    "LinearSpec": "base.layers[], type: linear",
    "SliceSpec": "base.layers[].slices[]",
    "EmbeddingSpec": "base.layers[], type: embedding",
    "InitSpec": "base.init",
    "TransformersSpec": "base, kind: transformers",
    "CausalLmSpec": "base, kind: causal_lm",
    "OnnxSpec": "base, kind: onnx",
    "SiteRule": "base.sites[], kind: onnx",
    "AdapterSpec": "adapters[]",
    "ExportSpec": "export",
    "TuneSpec": "export.tune",
    "Costs": "export.tune.costs",
    "CostTerms": "export.tune.costs.kernels",
    "ParitySpec": "parity",
}
SPEC_INTRODUCTION = """\
# The spec

Made from the JSON Schema that `loraexport schema` prints and editors use. Paths are relative to
the spec's own folder. Parsing is strict: an unknown key, a key given twice and a value of another
type are errors, all of a file reported at once with their lines.
[Your own model](../guides/own-model.md) has a whole one.
"""
CLI_INTRODUCTION = """\
# Commands

Made from the commands themselves. `--json` where a program reads; `loraexport --debug …` shows
the traceback of an error. [Exit codes](errors.md#exit-codes) tell what went wrong. A GPU host
without the exporter has a command of the runtime, `python -m loraexport_runtime check`: see
[operations](../guides/operations.md#check-before-traffic).
"""
SERVER_INTRODUCTION = """\
# Routes and settings of the server

Made from the document that `GET /openapi.json` gives, and from the settings themselves.
[Serve](../guides/serve.md) says what they are for. An unknown field of a body is a 400 that
names it.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    schema: Schema = json_schema()
    pages = {
        "reference/spec.md": spec_page(schema),
        "reference/cli.md": cli_page(),
        "reference/server.md": server_page(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def spec_page(schema: Schema) -> str:
    """The whole spec, a table for each object; KeyError if the schema has one without a title."""
    parts = [SPEC_INTRODUCTION, "## The file", key_table(schema)]
    unordered = sorted(set(schema["$defs"]) - set(ORDER))
    for name in (*ORDER, *unordered):
        definition = schema["$defs"][name]
        parts += [f"## {TITLES[name]}", definition.get("description", ""), key_table(definition)]
    return "\n\n".join(part for part in parts if part) + "\n"


def key_table(definition: Schema) -> str:
    """A row for each key of an object: type, default, what it means."""
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for key, value in definition["properties"].items():
        required = key in definition.get("required", ())
        default = "required" if required else f"`{json.dumps(value.get('default'))}`"
        if value.get("default") is None and not required:
            default = "–"
        if isinstance(value.get("default"), dict):
            default = "see there"
        cells = (f"`{key}`", type_text(value), default, value.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def type_text(value: Schema) -> str:
    """A schema's type in words: `integer above 0`, `list of one of a, b`."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{TITLES[name]}](#{anchor(TITLES[name])})"
    for union in ("anyOf", "oneOf"):
        if union in value:
            options = [type_text(option) for option in value[union] if option != {"type": "null"}]
            return " or ".join(options)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return "one of " + ", ".join(f"`{option}`" for option in value["enum"])
    if value["type"] == "array":
        return f"list of {type_text(value['items'])}" if "items" in value else "list"
    bounds = [
        f" {word} {value[key]}"
        for key, word in (("exclusiveMinimum", "above"), ("minimum", "from"))
        if key in value
    ]
    return {"string": "text", "boolean": "true or false"}.get(value["type"], value["type"]) + (
        "".join(bounds)
    )


def anchor(title: str) -> str:
    """The address that mkdocs gives a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in "_- ")
    return "-".join(kept.split())


def cli_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = [CLI_INTRODUCTION]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(
            ["loraexport", name, *("[options]" for _ in options[:1])]
            + [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
        )
        parts += [f"## {name}", command.help, f"    {usage}"]
        rows = ["| | default | |", "| --- | --- | --- |"]
        rows += [parameter_row(parameter) for parameter in (*arguments, *options)]
        if len(rows) > 2:
            parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def server_page() -> str:
    """Every key of the settings, every route, and the fields of every body and answer."""
    parts = [SERVER_INTRODUCTION, "## Settings"]
    parts += ["A flag and a variable too: `batch_rows`, `--batch-rows`, `LORAEXPORT_BATCH_ROWS`."]
    for title, kind in (("", Settings), ("### Of an artifact, below `models`", ModelSettings)):
        schemas = msgspec.json.schema_components([kind])[1]
        parts += [title, settings_table(schemas[kind.__name__])]
    for port, admin in (("clients", False), ("operators", True)):
        document = describe(admin)
        parts.append(f"## Port of {port}")
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                parts += [f"### {method.upper()} {path}", operation["summary"]]
                parts += fields(operation, document["components"]["schemas"])
    return "\n\n".join(part for part in parts if part) + "\n"


def settings_table(schema: Schema) -> str:
    """A row for each key, with its default."""
    rows = ["| key | default | |", "| --- | --- | --- |"]
    for key, value in schema["properties"].items():
        required = key in schema.get("required", ())
        default = "required" if required else f"`{json.dumps(value.get('default'))}`"
        shown = "–" if default in ("`null`", "`[]`", "`false`") else default
        text = value.get("description", "").replace("|", "\\|")
        rows.append(f"| `{key}` | {shown} | {text} |")
    return "\n".join(rows)


def fields(operation: Schema, schemas: Schema) -> list[str]:
    """What a route takes, and what it gives, by the names of their fields."""
    said = []
    content = operation.get("requestBody", {}).get("content", {})
    for media in content.values():
        body = schemas[media["schema"]["$ref"].rsplit("/", 1)[-1]]
        required = body.get("required", ())
        names = [f"**{name}**" if name in required else name for name in body["properties"]]
        said.append(f"Takes {', '.join(names)}.")
    for media in operation["responses"]["200"]["content"].values():
        ref = media["schema"].get("$ref")
        if ref:
            answer = schemas[ref.rsplit("/", 1)[-1]]
            said.append(f"Gives {', '.join(answer['properties'])}.")
    return said


def parameter_row(parameter: Any) -> str:
    """One argument or option; several values are told."""
    is_option = parameter.param_type_name == "option"
    label = ", ".join(parameter.opts) if is_option else parameter.name.upper()
    default = parameter.default
    shown = "required" if parameter.required else "–"
    if not parameter.required and default not in (None, False, ()) and not callable(default):
        shown = f"`{default}`"
    text = getattr(parameter, "help", None) or ""
    if parameter.multiple:
        text += " May be given several times."
    return f"| `{label}` | {shown} | {text.replace('|', chr(92) + '|')} |"
