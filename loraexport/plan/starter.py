"""A base and adapters -> a commented spec of the whole model, to start from."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from loraexport_runtime.contract.foreign import has_file
from loraexport_runtime.contract.kinds import TensorEntry
from loraexport_runtime.contract.strict_yaml import to_yaml
from loraexport_runtime.errors import quoted

from ..artifact import cannot_write, write_whole
from ..errors import BaseModelError, UsageError
from ..hf.sentences.files import MODULES_FILE
from ..hf.sentences.reader import find_sentence_task
from ..hf.sources import resolve_directory
from ..spec.reader import json_schema, read_spec
from ..spec.schema import NAME_PATTERN, Spec
from .model import ModelPlan
from .plan import AdapterPlan, make_plan
from .task import GENERATING, TASKS, read_architectures

SCHEMA_FILE = "spec.schema.json"
_SLOTS = 8
"""At least: a service that starts with one tenant gets others, and a slot of LoRA is small."""
_NAME_RULE = "letters, digits, '.', '_', '-', the first a letter or digit, at most 64"


def write_spec(base: str, adapters: Sequence[str | Path], path: Path) -> Spec:
    """Plan what is found, write it as a spec, and read that back.

    `spec.schema.json` is written beside it for editors, where there is none.

    Args:
        base: a directory, hub id or `package:` path, as a spec names it, from here.
        adapters: PEFT directories or hub ids, or `NAME=` and one.

    Raises:
        UsageError: `path` exists or cannot be written, two adapters would have one name, or a
            folder's name is none for a spec.
        DiskFullError: there is no room for it.
        BaseModelError, AdapterError: the base or an adapter cannot be used, or do not fit: what a
            build of the spec would say.
    """
    _require_free(path)
    sources = _name_adapters(adapters)
    directory = resolve_directory(base, Path(), BaseModelError)
    entries = [{"name": name, "path": _from_spec(source, path)} for name, source in sources.items()]
    task = find_task(directory)
    kind = "transformers"
    if task == "causal-lm" and GENERATING & set(read_architectures(directory)):
        kind = "causal_lm"
    data: dict[str, Any] = {
        "version": 1,
        "name": _artifact_name(path, base, directory),
        "base": {"kind": kind, "path": _from_spec(base, path)},
        "adapters": entries,
        "slots": max(_SLOTS, len(entries)),
        "export": {"tune": {"device": "cpu"}},
    }
    if kind == "transformers":
        data["base"]["task"] = task
        data["export"]["tune"]["tokens"] = 512
    planned = make_plan(Spec.model_validate_json(json.dumps(data)), path.resolve().parent)
    inputs = planned.kind.inputs if isinstance(planned.kind, ModelPlan) else ()
    text = _as_yaml(data, path, planned.adapters, planned.max_rank, inputs)
    _require_free(path)  # a plan takes a while
    write_whole(path, text.encode())
    if not has_file(path.with_name(SCHEMA_FILE)):
        schema = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
        write_whole(path.with_name(SCHEMA_FILE), schema.encode())
    return read_spec(path)


def _require_free(path: Path) -> None:
    """Raise UsageError unless nothing is there under this name, and its folder is."""
    try:
        path.lstat()
    except FileNotFoundError as error:
        if os.path.isdir(path.parent):
            return
        raise UsageError(
            f"{path.parent}: no such folder; make it, or choose another --out"
        ) from error
    except OSError as error:
        raise cannot_write(path, error) from error
    raise UsageError(f"{path} exists and is not overwritten; choose another --out")


def _as_yaml(
    data: Mapping[str, Any],
    path: Path,
    adapters: Sequence[AdapterPlan],
    max_rank: int,
    inputs: Sequence[TensorEntry],
) -> str:
    """The spec with a comment wherever there is a choice."""
    base, generates = data["base"], data["base"]["kind"] == "causal_lm"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "#",
        f"# loraexport build {path}",
        "version: 1",
        _line("name", data["name"]) + " # the artifact's folder",
        "base:",
        f"  kind: {base['kind']}",
        "  " + _line("path", base["path"]),
    ]
    if generates:
        lines.append("  # weights: int4 # a base of a quarter of the size; its adapters stay float")
    else:
        lines.append(f"  task: {base['task']} # found in the base's own files")
        lines.append(f"  # it takes {', '.join(map(str, inputs))}")
    lines.append("adapters:")
    for entry, adapter in zip(data["adapters"], adapters, strict=True):
        lines.append(f"  # {_describe(adapter)}")
        lines.append("  - " + _line("name", entry["name"]))
        lines.append("    " + _line("path", entry["path"]))
    lines += [
        f"slots: {data['slots']} # those that are free take adapters loaded while a service runs",
        f"max_rank: {max_rank}",
        "# sites: all-linear # where later adapters may apply; default: where these do",
    ]
    tune = "{device: cpu} # on a GPU: {device: cuda}"
    if not generates:
        tune = "{device: cpu, tokens: 512} # on a GPU: {device: cuda, tokens: 4096}"
    lines += [
        "export:",
        "  dtype: float32 # float16 or bfloat16 for a GPU",
        f"  tune: {tune}",
    ]
    return "\n".join(lines) + "\n"


def _name_adapters(adapters: Sequence[str | Path]) -> dict[str, str]:
    """Name -> source, by `NAME=` or else by the folder.

    Raises:
        UsageError: a name is none for a spec, or two are the same.
    """
    sources: dict[str, str] = {}
    for argument in map(str, adapters):
        name, equals, source = argument.partition("=")
        if not equals or os.path.isdir(argument):
            name, source = _folder_name(argument), argument
        if not re.fullmatch(NAME_PATTERN, name) or len(name) > 64:
            raise UsageError(
                f"{quoted(name)} is no name for an adapter ({_NAME_RULE}); give it one:"
                f" --adapter NAME={source}"
            )
        if name in sources:
            raise UsageError(
                f"two adapters are named {name!r}, {sources[name]} and {source}; name one:"
                f" --adapter NAME={source}"
            )
        sources[name] = source
    return sources


def _folder_name(source: str) -> str:
    """Of a directory its own, wherever links lead to; of a hub id the model's."""
    if os.path.isdir(source):
        return Path(source).resolve().name
    return PurePosixPath(source).name.partition("@")[0]


def _artifact_name(path: Path, base: str, directory: Path) -> str:
    """The spec's own name, if someone chose one; else the base's."""
    chosen = path.stem
    if chosen == "spec" or not re.fullmatch(NAME_PATTERN, chosen):
        chosen = _folder_name(base) if not base.startswith("package:") else directory.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", chosen).lstrip("._-")[:64]
    return name.removesuffix(".failed") or "model"


def find_task(directory: Path) -> str:
    """The task that a Hugging Face directory's own files speak of."""
    if has_file(directory / MODULES_FILE):
        return find_sentence_task(directory)
    names = read_architectures(directory)
    return next(
        (task for name in names for ending, task in TASKS.items() if name.endswith(ending)),
        "feature-extraction",
    )


def _line(key: str, value: str) -> str:
    return to_yaml({key: value}).strip()


def _from_spec(source: str, path: Path) -> str:
    """A path as the spec must name it: a directory relative to the spec's own folder."""
    if source.startswith("package:") or not os.path.isdir(source):
        return source
    return Path(os.path.relpath(Path(source).resolve(), path.resolve().parent)).as_posix()


def _describe(adapter: AdapterPlan) -> str:
    modules = adapter.header.modules.values()
    ranks = sorted({module.rank for module in modules})
    scalings = sorted({round(module.scaling, 6) for module in modules})
    kinds = sorted({site.rsplit(".", 1)[-1] for site in adapter.modules})
    return (
        f"{len(adapter.modules)} sites ({', '.join(kinds)}), rank {', '.join(map(str, ranks))},"
        f" scaling {', '.join(f'{scaling:g}' for scaling in scalings)}"
        + (", rsLoRA" if adapter.header.rslora else "")
    )
