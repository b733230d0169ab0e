"""The command line of the server, made of its settings."""

import argparse
from typing import Any, get_args

import msgspec

from ..version import __version__
from .check import hints
from .schema import Settings

_NO_FLAGS = ("models",)
"""The words without a dash name the artifacts."""


def make_parser() -> argparse.ArgumentParser:
    """The flags, one for each key; keys of clients and operators have none."""
    parser = argparse.ArgumentParser(
        prog="loraexport-serve",
        description="Serve artifacts over HTTP. Each option is a key of the settings file and a"
        " variable LORAEXPORT_* too; a flag goes before a variable, and that before the file.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="*", metavar="[NAME=]ARTIFACT", help="folders of artifacts")
    parser.add_argument("--config", metavar="FILE", help="settings, YAML")
    parser.add_argument("--version", action="version", version=__version__)
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    for name, kind in hints(Settings).items():
        if name in _NO_FLAGS:
            continue
        text = _description(kind)
        default = defaults[name]
        if default not in (None, False, ()):
            text += f" (default: {default})"
        flag = f"--{name.replace('_', '-')}"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": None}
        if isinstance(default, bool):
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            options |= {"metavar": "A,B" if default == () else name.split("_")[-1].upper()}
        parser.add_argument(flag, **options)
    return parser


def _description(kind: Any) -> str:
    metas = [meta for meta in get_args(kind)[1:] if isinstance(meta, msgspec.Meta)]
    return next((meta.description for meta in metas if meta.description), "")
