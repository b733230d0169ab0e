"""A config's regular expressions, tried before PEFT matches them with `re`, which has no bound."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loraexport_runtime.errors import AdapterConfigError

SECONDS = 10.0
"""For all patterns on all modules of a model: hundreds of times what usable ones take."""
_SPECIAL = set(r"\[](){}*+?|^$")
_FIELDS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern")
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except re.error:
        continue
    for name in names:
        compiled.fullmatch(name)
"""


def require_bounded(config: Mapping[str, Any], names: Iterable[str], folder: Path) -> None:
    """Match every pattern with every module's name as PEFT does, in a process that can be ended.

    Raises:
        AdapterConfigError: they do not end.
    """
    patterns = list(_patterns(config))
    if not any(_SPECIAL & set(text) for key in _FIELDS for text in config.get(key) or ()):
        return  # names, as nearly always
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    try:
        subprocess.run(
            command,
            input=json.dumps([patterns, list(names)]),
            text=True,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterConfigError(
            f"{folder}: peft, with which the build is compared, does not come to an end with the"
            " regular expressions of its config: one repeats what already repeats; write"
            " target_modules, exclude_modules, rank_pattern and alpha_pattern without such"
        ) from error


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """Every pattern as PEFT puts it together."""
    for pattern in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
        yield rf"(.*\.)?({pattern})$"
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield config[key]
    layers = config.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
