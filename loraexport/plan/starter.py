"""A base and adapters -> a commented spec of the whole model, to start from."""

import os
from collections.abc import Sequence
from pathlib import Path

from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.foreign import has_file, read_object, value_of

from ..errors import BaseModelError, SpecError, UsageError
from ..hf.sources import resolve_directory
from ..spec.reader import read_spec
from ..spec.schema import Spec
from ..spec.strict_yaml import to_yaml

_TASKS = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "causal-lm",
    "ForImageClassification": "image-classification",
    "VisionModelWithProjection": "image-embedding",
}


def write_spec(base: str, adapters: Sequence[Path], path: Path) -> Spec:
    """Write a spec for what is found, and read it back.

    Args:
        base: a directory, hub id or `package:` path, as a spec names it, from here.
        adapters: PEFT directories.

    Raises:
        UsageError: `path` exists, or two adapters would have one name.
        SpecError: the name of a folder, or of `path`, is no name for a spec.
        BaseModelError, AdapterError: the base or an adapter cannot be used, or do not fit.
    """
    if path.exists():
        raise UsageError(f"{path} exists and is not overwritten; choose another --out")
    names = [adapter.resolve().name for adapter in adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two adapters are named {twice[0]!r} by their folders; rename one")
    from ..hf.skeleton import read_skeleton

    directory = resolve_directory(base, Path(), BaseModelError)
    task = find_task(directory)
    skeleton = read_skeleton(directory, task, "float32")
    headers = [read_adapter(adapter) for adapter in adapters]
    lines = [
        "# yaml-language-server: $schema=spec.schema.json",
        "#",
        f"# loraexport build {path}",
        "version: 1",
        _one("name", path.stem),
        "base:",
        "  kind: transformers",
        "  " + _one("path", _from_spec(base, directory, path)),
        f"  task: {task} # found in the base's own files",
        "adapters:",
    ]
    for name, adapter, header in zip(names, adapters, headers, strict=True):
        matched = match_sites(header, skeleton.sites)
        lines.append(f"  # {_describe(header, matched)}")
        lines.append("  - " + _one("name", name))
        lines.append("    " + _one("path", _from_spec(str(adapter), adapter, path)))
    lines += [
        f"slots: {len(adapters)} # more leave room for adapters loaded while a service runs",
        f"max_rank: {max(header.max_rank for header in headers)}",
        "# sites: all-linear # where later adapters may apply; default: where these do",
        "export:",
        "  dtype: float32 # float16 or bfloat16 for a GPU",
        "  tune: {device: cpu, tokens: 512} # on a GPU: {device: cuda, tokens: 4096}",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        return read_spec(path)
    except SpecError:  # a folder's or the file's own name may be no name for a spec
        path.unlink()
        raise


def find_task(directory: Path) -> str:
    """The task that a Hugging Face directory's own files speak of."""
    file = directory / "config.json"
    config = read_object(file, BaseModelError, "give a Hugging Face model's directory")
    if has_file(directory / "modules.json"):
        return "sentence-embedding"
    architectures = []
    if config.get("architectures") is not None:
        architectures = value_of(config, "architectures", list, file, BaseModelError)
    for name in map(str, architectures):
        for ending, task in _TASKS.items():
            if name.endswith(ending):
                return task
    return "feature-extraction"


def _one(key: str, value: str) -> str:
    return to_yaml({key: value}).strip()


def _from_spec(source: str, directory: Path, path: Path) -> str:
    """A path as the spec must name it: a directory relative to the spec's own folder."""
    if source.startswith("package:") or not Path(source).is_dir():
        return source
    return Path(os.path.relpath(directory.resolve(), path.resolve().parent)).as_posix()


def _describe(header: AdapterHeader, matched: dict[str, str]) -> str:
    modules = header.modules.values()
    ranks = sorted({module.rank for module in modules})
    scalings = sorted({round(module.scaling, 6) for module in modules})
    kinds = sorted({site.rsplit(".", 1)[-1] for site in matched})
    return (
        f"{len(matched)} sites ({', '.join(kinds)}), rank {', '.join(map(str, ranks))},"
        f" scaling {', '.join(f'{scaling:g}' for scaling in scalings)}"
        + (", rsLoRA" if header.rslora else "")
    )
