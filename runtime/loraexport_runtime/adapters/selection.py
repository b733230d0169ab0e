"""Which modules PEFT puts LoRA on: target_modules and the fields beside it.

The tensors of an adapter say where it applies. PEFT leaves those out that its config does not
select, so that a config and tensors which disagree are not of one training.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterWeightsError, quoted
from .files import CONFIG_FILE
from .patterns import Clock, Pattern

_ALL_LINEAR = "all-linear"
_ANY_LAYER = r".*?\.[^.]*\."
_INDEX = r"(?P<idx>\d+)\."


def check_selection(modules: Iterable[str], config: Mapping[str, Any], weights: Path) -> None:
    """Hold the modules that have LoRA to those that the config selects.

    Args:
        modules: by their names in the file of weights.

    Raises:
        AdapterWeightsError: PEFT would leave one out.
        AdapterConfigError: a pattern takes too long.
    """
    selection = Selection(config, weights.with_name(CONFIG_FILE))
    for module in modules:
        if (key := selection.field_against(module)) is not None:
            raise AdapterWeightsError(
                f"{weights}: module {module!r} has LoRA, but the config's {key} ="
                f" {quoted(config[key])} leaves it out, and peft would not apply it; config and"
                " weights are not of one training"
            )


class Selection:
    """The modules that a config selects, by PEFT's rule.

    A text is a regular expression of the whole name; a list has names, or what follows one of a
    name's dots. `exclude_modules` goes first. Of what a list selects by its end,
    `layers_to_transform` leaves the layers with these numbers. Nothing in a module of
    `modules_to_save`, which is trained whole, has LoRA. Source:
    peft.tuners.tuners_utils.check_target_module_exists.
    """

    def __init__(self, config: Mapping[str, Any], file: Path) -> None:
        """Raises AdapterConfigError: a pattern is none."""
        self._clock = Clock()
        targets = config.get("target_modules")
        is_any = targets is None or str(targets).lower() == _ALL_LINEAR
        self._targets = None if is_any else _Named(targets, f"{file}: target_modules", self._clock)
        excluded = config.get("exclude_modules")
        self._excluded = (
            _Named(excluded, f"{file}: exclude_modules", self._clock) if excluded else None
        )
        where = f"{file}: modules_to_save"
        names = config.get("modules_to_save") or ()
        self._wholes = [Pattern(name, where, r"(?:^|.*\.)", r"(?:$|\..*)") for name in names]
        layers = config.get("layers_to_transform")
        self._layers = frozenset(layers if isinstance(layers, list) else [layers]) - {None}
        texts = _layer_patterns(config) if self._layers else []
        self._counts = [Pattern(text, f"{file}: layers_pattern") for text in texts]

    def field_against(self, module: str) -> str | None:
        """The field by which PEFT leaves a module out; None: it takes it.

        Raises:
            AdapterConfigError: a pattern takes too long.
        """
        if self._excluded is not None and self._excluded.names(module):
            return "exclude_modules"
        if any(self._clock.match(whole, module) for whole in self._wholes):
            return "modules_to_save"
        if self._targets is None:
            return None
        if not self._targets.names(module):
            return "target_modules"
        by_end = self._targets.ends is not None and module not in self._targets.ends
        if self._layers and by_end and self._layer(module) not in self._layers:
            return "layers_to_transform"
        return None

    def _layer(self, module: str) -> int | None:
        found = (self._clock.match(pattern, module) for pattern in self._counts)
        return next((int(match["idx"]) for match in found if match is not None), None)


class _Named:
    """target_modules or exclude_modules: a regular expression, or ends of names."""

    def __init__(self, value: Any, where: str, clock: Clock) -> None:
        self._clock = clock
        self._pattern = Pattern(value, where) if isinstance(value, str) else None
        self.ends: frozenset[str] | None = None
        """Names, or what follows a dot of them; None of a regular expression."""
        if not isinstance(value, str):
            self.ends = frozenset(value)

    def names(self, module: str) -> bool:
        if self._pattern is not None:
            return self._clock.match(self._pattern, module, whole=True) is not None
        parts = module.split(".")
        return any(".".join(parts[start:]) in (self.ends or ()) for start in range(len(parts)))


def _layer_patterns(config: Mapping[str, Any]) -> list[str]:
    """What stands before the number of a layer: PEFT's default is any name."""
    given = config.get("layers_pattern")
    if not given:
        return [_ANY_LAYER + _INDEX]
    texts = [given] if isinstance(given, str) else given
    return [rf"(?:^|.*?\.){text}\.{_INDEX}" for text in texts]
