"""Patterns on which PEFT's own matching does not end are refused before PEFT is asked."""

from pathlib import Path

import pytest

from loraexport.parity.model import peft_patterns
from loraexport.parity.model.peft_patterns import require_bounded
from loraexport_runtime.errors import AdapterConfigError

NAMES = ["encoder.layers.0.q", "a" * 60 + ".q"]
SLOW = r"((.+)+)+!"
FOLDER = Path("sql")


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"layers_pattern": [SLOW]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_without_end(config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_patterns, "SECONDS", 1.0)
    with pytest.raises(AdapterConfigError, match=r"^sql: peft, .* does not come to an end"):
        require_bounded(config, NAMES, FOLDER)


def test_usable_ones() -> None:
    config = {
        "target_modules": r"(?i).*layers\.\d+\.(q|v)",
        "rank_pattern": {"q": 4, "(": 4},  # the second is refused elsewhere
        "layers_pattern": None,
    }
    require_bounded(config, NAMES, FOLDER)


def test_names_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_patterns.subprocess, "run", None)
    config = {"target_modules": ["q", "v"], "rank_pattern": {"layers.0.q": 4}, "r": 8}
    require_bounded(config, NAMES, FOLDER)
