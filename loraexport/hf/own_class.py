"""Whether the class that a checkpoint was saved from is one of transformers', of this model."""

from pathlib import Path
from typing import Any

import transformers

from loraexport_runtime.errors import quoted

from ..errors import BaseModelError
from .folder import CONFIG


def require_own_class(config: Any, directory: Path) -> None:
    """Raise BaseModelError if config.json names no class of its own model's."""
    file = directory / CONFIG
    names = config.architectures or ()
    for name in names:
        kind = getattr(transformers, name, None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            raise BaseModelError(
                f"{file}: architectures names {quoted(name)}, which is no class of transformers;"
                f" its own for a model of type {config.model_type!r} may compute something else. Is"
                " it known to compute the same, correct architectures"
            )
        if not _are_kin(kind.config_class, type(config)):
            raise BaseModelError(
                f"{file}: architectures names {quoted(name)}, but model_type is"
                f" {config.model_type!r}, another model; correct one of them"
            )


def _are_kin(left: Any, right: Any) -> bool:
    """Whether one config is the other, a class made of it, or a part of the other's model."""
    if left is None:
        return True
    if issubclass(left, right) or issubclass(right, left):
        return True
    parts = {*(left.sub_configs or {}).values()}, {*(right.sub_configs or {}).values()}
    return right in parts[0] or left in parts[1] or _package(left) == _package(right)


def _package(kind: type) -> str:
    return kind.__module__.rpartition(".")[0]
