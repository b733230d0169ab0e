"""What a sentence-transformers directory declares about its pooling, and what is refused of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraexport.errors import BaseModelError
from loraexport.hf.pooling import SentencePooling


def declare(folder: Path, *modules: str, **config: Any) -> Path:
    listed = [
        {"idx": index, "name": str(index), "path": name, "type": f"sentence_transformers.{name}"}
        for index, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "Pooling").mkdir()
    (folder / "Pooling/config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("normalise", [False, True])
def test_what_is_declared(tmp_path: Path, normalise: bool) -> None:
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    declare(tmp_path, *modules, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    pooling = SentencePooling.read(tmp_path)
    assert (pooling.mode, pooling.normalise) == ("cls_token", normalise)


def test_a_module_that_changes_the_vector(tmp_path: Path) -> None:
    declare(tmp_path, "Transformer", "Pooling", "Dense", pooling_mode_mean_tokens=True)
    with pytest.raises(BaseModelError, match=r"modules\.json lists Dense; not supported"):
        SentencePooling.read(tmp_path)


@pytest.mark.parametrize(
    ("modes", "listed"),
    [
        (("weightedmean_tokens",), r"\['weightedmean_tokens'\]"),
        (("mean_tokens", "max_tokens"), r"\['mean_tokens', 'max_tokens'\]"),
        ((), r"\[\]"),
    ],
)
def test_a_mode_that_is_none_of_ours(tmp_path: Path, modes: tuple[str, ...], listed: str) -> None:
    config = {f"pooling_mode_{mode}": True for mode in modes}
    declare(tmp_path, "Transformer", "Pooling", **config)
    with pytest.raises(BaseModelError, match=f"config.json: pooling is {listed}; supported is one"):
        SentencePooling.read(tmp_path)


def test_nothing_is_declared(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no pooling is declared .* use task feature-extract"):
        SentencePooling.read(tmp_path)
