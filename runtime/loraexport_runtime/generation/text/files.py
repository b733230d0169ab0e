"""The files of a tokenizer in an artifact, as transformers saves them, each held to its digest."""

from collections.abc import Mapping
from typing import Any

from ...contract.foreign import MAX_BYTES, parse_json
from ...contract.listed import ListedFiles
from ...errors import ArtifactError
from .chat import DEFAULT, ChatTemplates

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MAX_TEMPLATE = 2**20
"""Bytes: the largest published templates have some 30 KiB."""


def read_config(files: ListedFiles, folder: str) -> tuple[dict[str, Any], ChatTemplates]:
    """The values of tokenizer_config.json, and the chat templates.

    Raises:
        ArtifactError: a file is damaged.
    """
    path = f"{folder}/{CONFIG}"
    config: Any = {}
    if path in files:
        data = read_listed(files, path, MAX_BYTES)
        config = parse_json(data, files.folder / path, ArtifactError)
    if not isinstance(config, dict):
        raise ArtifactError(f"{files.folder / path}: expected an object; build the artifact again")
    return config, ChatTemplates(_templates(files, folder, config), special_tokens(config))


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a template that tokenizer_config.json names: `bos_token` and the like."""
    named = config.get("extra_special_tokens")
    every = [*config.items(), *(named.items() if isinstance(named, dict) else ())]
    tokens = {}
    for key, value in every:
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (key.endswith("_token") or (named and key in named)):
            tokens[key] = text
    return tokens


def _templates(files: ListedFiles, folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    """By name: of the files of their own, and else of tokenizer_config.json."""
    texts = {}
    if f"{folder}/{TEMPLATE}" in files:
        texts[DEFAULT] = _read_text(files, f"{folder}/{TEMPLATE}")
    for path in sorted(files.below(f"{folder}/{MORE_TEMPLATES}")):
        name = path.rpartition("/")[2]
        if name.endswith(".jinja"):
            texts[name.removesuffix(".jinja")] = _read_text(files, path)
    listed = config.get("chat_template")
    if texts or listed is None:
        return texts
    if isinstance(listed, str):
        return {DEFAULT: listed}
    try:
        named = {entry["name"]: entry["template"] for entry in listed}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for text in (*named, *named.values())):
        raise ArtifactError(
            f"{files.folder / folder / CONFIG}: chat_template: expected a text, or a list of"
            " objects with name and template; build the artifact again"
        )
    return named


def _read_text(files: ListedFiles, path: str) -> str:
    try:
        return (
            read_listed(files, path, MAX_TEMPLATE)
            .decode()
            .replace("\r\n", "\n")
            .replace("\r", "\n")
        )
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{files.folder / path}: not UTF-8 text: {error}; build the artifact again"
        ) from error


def read_listed(files: ListedFiles, path: str, limit: int | None = None) -> bytes:
    """The bytes of a listed file. Raises ArtifactError: it is damaged, or has more than `limit`."""
    with files.open(path) as opened:
        content = opened.read() if limit is None else opened.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ArtifactError(
            f"{files.folder / path}: more than {limit >> 10} KiB, which no such file has; build"
            " the artifact again"
        )
    return content
