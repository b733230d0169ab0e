"""What a config.json may ask for: checked before transformers makes a list or a module of it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook

from loraexport_runtime.errors import MAX_QUOTED, quoted, shorten

from ..errors import BaseModelError

_MAX_LAYERS = 1_024
"""The deepest that is published has 1,000 (DeepNet); configs make lists of this length."""
_MAX_EXPERTS = 2**15
"""Twice the most that transformers has a config of (16,384)."""
_MAX_VALUE = 2**31 - 1
"""Of any integer: sizes are less, and torch's indices end there."""
_MAX_LABELS = 2**17
"""Six times ImageNet-21k's; a config writes out the name of each."""
_MAX_MODULES = 200_000
"""Of a model: the largest have some 100,000, experts in lists, and a module takes 10 us."""
_LIMITS = (
    (re.compile(r"(^|_)(layers?|depths?|blocks?)$"), _MAX_LAYERS),
    (re.compile(r"(^|_)experts$"), _MAX_EXPERTS),
    (re.compile(r"^num_(labels|classes)$"), _MAX_LABELS),
    (re.compile(""), _MAX_VALUE),
)
"""The first whose pattern a key's end fits."""


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Hold every integer of a config to what a model can have.

    Raises:
        BaseModelError: one is larger.
    """
    for key, value in _integers(config, ""):
        limit = next(limit for pattern, limit in _LIMITS if pattern.search(key))
        if abs(value) > limit:
            raise BaseModelError(
                f"{file}: {shorten(key, MAX_QUOTED)} is {quoted(value)}, and no model has more than"
                f" {limit:,}; correct it, or download the base again"
            )


def _integers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _integers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


@contextmanager
def bounded_modules(directory: Path) -> Iterator[None]:
    """Count the modules that are made, and end a model that has too many.

    Raises:
        BaseModelError: more than 200,000; sizes that are each sound may multiply to that.
    """
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise BaseModelError(
                f"{directory}: its config.json makes a model of more than {_MAX_MODULES:,} modules,"
                " as none has; correct its numbers of layers, heads and experts"
            )

    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
