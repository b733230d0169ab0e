"""How the next token is chosen: what of the logits is brought to the host, and the draw from it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import loraexport_runtime as lr
from loraexport.export.steps import row_logits_model, top_tokens_model
from loraexport_runtime.device.dtypes import NUMPY_DTYPES
from loraexport_runtime.device.memory import host_value
from loraexport_runtime.generation.request import GenerationRequest, checked
from loraexport_runtime.generation.sampling import Sampler, Sampling, draw, likeliest, log_shares
from loraexport_runtime.generation.steps.host_logits import HostLogits
from loraexport_runtime.generation.steps.top_tokens import RowLogits, TopTokens

ONNX = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_graph_of_the_top_tokens_is_onnx(dtype: str) -> None:
    model = ir.to_proto(top_tokens_model(ONNX[dtype]))
    onnx.checker.check_model(model, full_check=True)
    onnx.checker.check_model(ir.to_proto(row_logits_model(ONNX[dtype])), full_check=True)
    assert [node.op_type for node in model.graph.node].count("TopK") == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", [1, 7, 200])
@pytest.mark.parametrize("vocabulary", [300, 512, 211])  # 100 parts of 3, 128 of 4, one of 211
def test_the_top_tokens(dtype: str, vocabulary: int, count: int, tmp_path: Path) -> None:
    shape = (3, 2, vocabulary)
    logits = np.random.default_rng(0).standard_normal(shape).astype(NUMPY_DTYPES[dtype])
    value = ort.OrtValue.ortvalue_from_numpy(logits.copy())
    ir.save(top_tokens_model(ONNX[dtype]), tmp_path / "top.onnx")
    top = TopTokens(tmp_path / "top.onnx", dtype, vocabulary, CPU)
    bound = top.bind(value.data_ptr(), shape, np.array([5, 0]), count)
    for own in (logits, -logits):
        value.update_inplace(host_value(own, dtype))
        values, tokens = bound.run()
        rows = own.reshape(6, vocabulary)[[5, 0]].astype(np.float32)
        # The lower one of two tokens that are equally likely comes first.
        assert np.array_equal(tokens, np.argsort(-rows, axis=1, kind="stable")[:, :count])
        assert np.array_equal(values, np.take_along_axis(rows, tokens, axis=1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_logits_of_rows(dtype: str, tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 2, 50)).astype(NUMPY_DTYPES[dtype])
    value = ort.OrtValue.ortvalue_from_numpy(logits.copy())
    ir.save(row_logits_model(ONNX[dtype]), tmp_path / "rows.onnx")
    for reader in (RowLogits(tmp_path / "rows.onnx", dtype, 50, CPU), HostLogits()):
        found = reader.read(value, (3, 2, 50), np.array([5, 0, 2]))
        assert found.dtype == np.float32
        assert np.array_equal(found, logits.reshape(6, 50)[[5, 0, 2]].astype(np.float32))


def _choose(sampling: Sampling, shares: list[float], *drawn: float) -> list[int]:
    """Tokens from 10 on, of these shares, as the numbers drawn say."""

    class Given(Sampler):
        def __init__(self, number: float) -> None:
            super().__init__(sampling, [])
            self._number = number

        def uniform(self) -> float:
            return self._number

    logits = np.tile(np.log(np.array(shares)).astype(np.float32), (len(drawn), 1))
    tokens = np.tile(np.arange(len(shares)) + 10, (len(drawn), 1))
    return draw([Given(number) for number in drawn], logits, tokens).tolist()


def test_a_draw_takes_the_token_of_its_share() -> None:
    shares = [0.5, 0.3, 0.2]
    drawn = (0.0, 0.49, 0.51, 0.79, 0.81, 0.999)
    assert _choose(Sampling(1.0), shares, *drawn) == [10, 10, 11, 11, 12, 12]
    # 0.25, 0.09 and 0.04 of 0.38
    colder = (0.0, 0.65, 0.67, 0.89, 0.9, 0.999)
    assert _choose(Sampling(0.5), shares, *colder) == [10, 10, 11, 11, 12, 12]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    shares = [0.5, 0.3, 0.2]
    for top_p, last in ((0.4, 10), (0.6, 11), (0.75, 11), (0.85, 12), (1.0, 12), (1e-9, 10)):
        assert _choose(Sampling(1.0, top_p=top_p), shares, 0.9999) == [last], top_p
    # Of the two that stay, the first has 0.625.
    assert _choose(Sampling(1.0, top_p=0.75), shares, 0.62, 0.63) == [10, 11]


def test_no_draw_where_one_token_is_left() -> None:
    assert Sampling().is_greedy
    assert Sampling(1.0, top_k=1).is_greedy
    sizes = [
        Sampler(Sampling(1.0, top_k=top_k), []).num_candidates(300) for top_k in (0, 1, 50, 400)
    ]
    assert sizes == [300, 1, 50, 300]


def test_logits_that_are_minus_infinity_or_far_apart() -> None:
    sampler = Sampler(Sampling(0.01, seed=0), [])
    logits = np.array([[90.0, -90.0, -np.inf]], np.float32)
    assert draw([sampler], logits, np.array([[4, 5, 6]])).tolist() == [4]


def test_min_p_keeps_those_near_the_likeliest() -> None:
    shares = [0.5, 0.3, 0.15, 0.05]
    for min_p, last in ((0.0, 13), (0.2, 12), (0.5, 11), (0.7, 10), (1.0, 10)):
        assert _choose(Sampling(1.0, min_p=min_p), shares, 0.9999) == [last], min_p


def test_rows_of_different_options_are_drawn_together_as_alone() -> None:
    """Candidates beyond a row's top_k change nothing of it, to the last bit."""
    random = np.random.default_rng(0)
    options = [Sampling(0.7, 5, seed=1), Sampling(1.3, 40, 0.9, seed=2), Sampling(1.0, 11, seed=3)]
    alone, together = ([Sampler(one, [], index) for one in options] for index in (0, 0))
    for _ in range(50):
        logits = random.standard_normal((3, 300)).astype(np.float32)
        values, tokens = (
            np.stack(part) for part in zip(*(likeliest(row, 40) for row in logits), strict=True)
        )
        wanted = [sampler.choose(row) for sampler, row in zip(alone, logits, strict=True)]
        assert draw(together, values, tokens).tolist() == wanted


@pytest.mark.parametrize("num", [1, 3, 20, 100])
def test_the_likeliest(num: int) -> None:
    logits = np.random.default_rng(0).integers(0, 9, 100).astype(np.float32)
    values, tokens = likeliest(logits, num)
    assert tokens.tolist() == np.argsort(-logits, kind="stable")[:num].tolist()
    assert np.array_equal(values, logits[tokens])


def test_penalties_and_biases() -> None:
    logits = np.array([1.0, -1.0, 2.0, 3.0, 0.5], np.float32)
    repeated = Sampler(Sampling(repetition_penalty=2.0), [1, 3])
    repeated.note(2)
    assert repeated.change(logits).tolist() == [1.0, -2.0, 1.0, 1.5, 0.5]
    counted = Sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1, 3])
    for token in (2, 2, 0):
        counted.note(token)
    assert counted.change(logits).tolist() == [0.25, -1.0, 1.0, 3.0, 0.5]
    biased = Sampler(Sampling(logit_bias={0: 5.0, 3: -100.0}), [])
    assert biased.choose(logits) == 0
    assert logits.tolist() == [1.0, -1.0, 2.0, 3.0, 0.5]
    assert not any(one.takes_likeliest for one in (repeated, counted, biased))
    assert Sampler(Sampling(), []).takes_likeliest


def test_tokens_that_do_not_come_early() -> None:
    logits = np.array([1.0, 9.0, 2.0], np.float32)
    sampler = Sampler(Sampling(), [], ends=[1], min_tokens=2)
    chosen = []
    for _ in range(3):
        assert sampler.takes_likeliest == (len(chosen) == 2)
        chosen.append(sampler.choose(logits))
        sampler.note(chosen[-1])
    assert chosen == [2, 2, 1]


def test_a_grammar_allows_some_tokens_and_ends_the_text() -> None:
    class Two:
        def mask(self) -> np.ndarray:
            return np.array([True, False, True])

        def accept(self, token: int) -> bool:
            return token == 2

    sampler = Sampler(Sampling(), [], allowed=Two())
    assert sampler.choose(np.array([1.0, 9.0, 0.5], np.float32)) == 0
    assert [sampler.note(token) for token in (0, 2)] == [False, True]


def test_log_shares() -> None:
    logits = np.array([[1e4, 0.0, 1e4]], np.float32)
    assert np.allclose(np.exp(log_shares(logits)), [[0.5, 0.0, 0.5]])


# What a request may ask


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tokens": []}, "tokens is empty; a prompt has one token at least"),
        ({"tokens": "hello"}, "tokens is 'hello'; expected a list of token ids"),
        ({"tokens": [1, 300]}, r"tokens\[1\] is 300; expected a token id, 0 to 299"),
        ({"tokens": [1.0]}, r"tokens\[0\] is 1.0; expected a token id"),
        ({"tokens": [True]}, r"tokens\[0\] is True; expected a token id"),
        ({"adapter": 3}, "adapter is 3; expected a name, weights by name, or None"),
        ({"adapter": {"a": 1.0}}, "adapter is a blend, which this graph has no input for; add"),
        ({"tenant": 3}, "tenant is 3; expected a name, or None"),
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number from 1 on"),
        ({"max_tokens": 100}, "of 3 tokens and 100 new ones are more than the 64 that this gen"),
        ({"min_tokens": 9}, "min_tokens is 9; expected a whole number from 0 to 8"),
        ({"temperature": -1}, "temperature is -1; expected a number, 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number, 0 or more"),
        ({"temperature": float("inf")}, "temperature is inf; expected a number, 0 or more"),
        ({"top_k": -1}, "top_k is -1; expected a whole number from 0 on"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0, up to 1"),
        ({"top_p": float("nan")}, "top_p is nan; expected a number, 0 to 1"),
        ({"min_p": 1.5}, "min_p is 1.5; expected a number, 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; expected a number above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf; expected a number, any fin"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'; expected a number, any finite"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; expected numbers by token id"),
        ({"logit_bias": {300: 1.0}}, r"logit_bias\[0\] is 300; expected a token id"),
        ({"logit_bias": {3: float("nan")}}, r"logit_bias\[3\] is nan; expected a number"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0 on"),
        ({"stop": "x"}, "stop is 'x'; expected a list of texts, none of them empty"),
        ({"stop": [""]}, "stop is .*; expected a list of texts, none of them empty"),
        ({"stop": ["x"] * 65}, "stop has 65 texts; at most 64 may end an answer"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids\[0\] is -1; expected a token id"),
        ({"ignore_eos": 1}, "ignore_eos is 1; expected True or False"),
        ({"n": 0}, "n is 0; expected a whole number from 1 to 128"),
        ({"logprobs": 65}, "logprobs is 65; expected a whole number from 0 to 64"),
        ({"prompt_logprobs": True}, "prompt_logprobs is True; expected a whole number"),
        ({"timeout": float("nan")}, "timeout is nan; expected a number, 0 or more"),
    ],
)
def test_a_request_that_cannot_be(options: dict[str, Any], text: str) -> None:
    request = GenerationRequest(**({"tokens": [5, 6, 7], "max_tokens": 8} | options))
    with pytest.raises(lr.InputError, match=text):
        checked(request, 300, 64)


def test_numbers_and_tokens_of_numpy_and_torch() -> None:
    import torch

    plain = checked(GenerationRequest(tokens=[5, 6], max_tokens=3, logit_bias={7: 1.0}), 300, 64)
    for tokens in (np.array([5, 6], np.int32), torch.tensor([5, 6]), (np.int64(5), 6)):
        request = GenerationRequest(
            tokens=tokens,  # type: ignore[arg-type]
            max_tokens=np.int64(3),  # type: ignore[arg-type]
            top_p=np.float32(1.0),  # type: ignore[arg-type]
            logit_bias={np.int64(7): np.float32(1.0)},  # type: ignore[dict-item]
        )
        read = checked(request, 300, 64)
        assert read == plain
        assert [type(token) for token in read.tokens] == [int, int]
