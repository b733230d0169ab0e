"""What a tail computes, against numpy text by text, for either padding and in every dtype."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.sentences import (
    DROPOUT,
    MODES,
    NORMALIZE,
    declare,
    dense,
    follow,
    layer_norm,
    pool,
    pooling,
)

from loraexport.hf.sentences.pooling import SentencePooling, make_tail
from loraexport.hf.sentences.reader import read_tail
from loraexport.hf.sentences.tail import Sentences

WIDTH = 6
LENGTHS = (5, 1, 9, 3)
_ERF = np.vectorize(math.erf)
ACTIVATIONS: dict[str, Any] = {
    "ELU": lambda x: np.where(x > 0, x, np.expm1(x)),
    "GELU": lambda x: x * (1 + _ERF(x / math.sqrt(2))) / 2,
    "Identity": lambda x: x,
    "LeakyReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
    "Tanh": np.tanh,
}


def read(folder: Path) -> SentencePooling:
    tail = read_tail(folder, "sentence-embedding")
    assert isinstance(tail, Sentences)
    module = make_tail(tail)
    assert isinstance(module, SentencePooling)
    return module


def texts(lengths: Sequence[int] = LENGTHS, width: int = WIDTH) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.standard_normal((length, width)) for length in lengths]


def batch(rows: Sequence[np.ndarray], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, attention_mask), with numbers where the padding is."""
    longest = max(map(len, rows))
    hidden = np.full((len(rows), longest, rows[0].shape[1]), 7.5)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(len(row))
        hidden[index, part], mask[index, part] = row, 1
    return torch.from_numpy(hidden), torch.from_numpy(mask)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("mode", [*MODES, ["max", "lasttoken", "mean"]], ids=str)
def test_a_mode(tmp_path: Path, mode: Any, left: bool) -> None:
    module = read(declare(tmp_path, pooling(WIDTH, mode)))
    names = [mode] if isinstance(mode, str) else mode
    expected = [np.concatenate([pool(text, name) for name in names]) for text in texts()]
    y = module(*batch(texts(), left)).numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_without_the_prompt(tmp_path: Path, mode: str, left: bool) -> None:
    module = read(declare(tmp_path, pooling(WIDTH, mode, include_prompt=False)))
    prompts = (2, 0, 8, 1)
    expected = [pool(text, mode, prompt) for text, prompt in zip(texts(), prompts, strict=True)]
    y = module(*batch(texts(), left), torch.tensor(prompts)).numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken", "mean_sqrt_len_tokens"])
def test_a_text_that_is_all_prompt_gives_zeros(tmp_path: Path, mode: str) -> None:
    module = read(declare(tmp_path, pooling(WIDTH, mode, include_prompt=False)))
    y = module(*batch(texts(), False), torch.tensor([5, 0, 0, 0]))
    assert (y[0] == 0).all()
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_long_texts_in_half_precision(tmp_path: Path, mode: str, dtype: torch.dtype) -> None:
    """600 tokens of about 200: their sum is beyond float16, their number beyond bfloat16."""
    module = read(declare(tmp_path, pooling(WIDTH, mode), NORMALIZE))
    hidden, mask = batch([200 + text for text in texts((600, 514))], True)
    hidden = hidden.to(dtype)
    y = module(hidden, mask)
    assert y.dtype == dtype
    rows = [row[keep == 1] for row, keep in zip(hidden.double().numpy(), mask.numpy(), strict=True)]
    expected = [follow(pool(row, mode), [NORMALIZE]) for row in rows]
    rounding = torch.finfo(dtype).eps
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dense(tmp_path: Path, name: str) -> None:
    home = "linear" if name == "Identity" else "activation"
    step = dense(WIDTH, 4, f"torch.nn.modules.{home}.{name}")
    module = read(declare(tmp_path, pooling(WIDTH, "mean"), step)).double()
    expected = [follow(pool(text, "mean"), [step], ACTIVATIONS[name]) for text in texts()]
    y = module(*batch(texts(), False)).numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "steps",
    [
        (dense(WIDTH, 4, None),),  # what is not said is Tanh
        (dense(WIDTH, 4, bias=False),),
        (dense(WIDTH, WIDTH, residual=True),),
        (dense(WIDTH, 9, residual=True), DROPOUT, dense(9, 4), NORMALIZE),
        (layer_norm(WIDTH), NORMALIZE),
        (NORMALIZE, dense(WIDTH, 3)),
    ],
    ids=["default", "no bias", "residual", "chain", "layer norm", "behind normalize"],
)
@pytest.mark.parametrize("kept", [None, 2, 100], ids=str)
def test_steps_in_their_order(tmp_path: Path, steps: Any, kept: int | None) -> None:
    """Of what comes out at the end the first numbers are kept, as encode keeps them."""
    folder = declare(tmp_path, pooling(WIDTH, "cls"), *steps, truncate_dim=kept)
    expected = [follow(pool(text, "cls"), steps)[:kept] for text in texts()]
    y = read(folder).double()(*batch(texts(), True)).numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)
