"""The engine that captures CUDA graphs, on the CPU without them: its caches, its choice of tokens.

tests/test_decoder.py runs it through every test of the interface; tests/test_gpu.py captures.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from test_decoder import CONTEXT, FAMILIES, PAD, VOCABULARY, open_driven, write_decoder

import loraexport_runtime as lr
from loraexport.pipeline import build
from loraexport_runtime import driven, top_tokens
from loraexport_runtime.devices import NUMPY_DTYPES, host_value
from loraexport_runtime.generate import TextGenerator, load_generator
from loraexport_runtime.kv_cache import Cache
from loraexport_runtime.sampling import Sampling, choose
from loraexport_runtime.top_tokens import TopTokens

CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
NAMES = (None, "first", "second")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driven")
    return build(write_decoder(folder, FAMILIES["Qwen2"]), folder / "out")[0]


@pytest.fixture(scope="module")
def genai(artifact: Path) -> TextGenerator:
    return load_generator(artifact)


@pytest.fixture
def generator(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> TextGenerator:
    """With caches of 16 tokens and more, where the model's whole context would be one size."""
    monkeypatch.setattr(driven, "_LENGTHS", 16)
    return open_driven(artifact)


def _batch(lengths: list[int], seed: int = 0) -> tuple[list[list[int]], list[str | None]]:
    random = np.random.default_rng(seed)
    prompts = [random.integers(3, VOCABULARY, length).tolist() for length in lengths]
    return prompts, [NAMES[index % 3] for index in range(len(lengths))]


def _caches(generator: TextGenerator) -> list[Cache]:
    engine: Any = generator._engine
    return list(engine._idle)


def _sizes(generator: TextGenerator) -> list[list[tuple[int, int]]]:
    return [list(cache._steps) for cache in _caches(generator)]


# The caches


def test_a_cache_is_used_again(generator: TextGenerator, genai: TextGenerator) -> None:
    """Of a longer batch first, so that its keys and values lie where later batches have none."""
    batches = [[9, 30, 4, 17, 1], [1], [3, 20, 2], [12, 5, 7, 30, 1, 1, 8, 2], [1, 1], [3, 20, 2]]
    for seed, lengths in enumerate(batches):
        prompts, names = _batch(lengths, seed)
        expected = genai.greedy(prompts, names, 12)
        assert np.array_equal(generator.greedy(prompts, names, 12), expected), lengths
    # One memory, and one step for each size: rows to a power of two, tokens to 16.
    assert _sizes(generator) == [[(8, 48), (1, 16), (4, 32), (2, 16)]]


def test_no_number_left_by_another_batch_reaches_a_row(
    generator: TextGenerator, genai: TextGenerator
) -> None:
    prompts, names = _batch([3, 20, 2])
    expected = genai.greedy(prompts, names, 12)
    generator.warm_up(4, 32)
    for memory in _caches(generator)[0]._memory.values():
        memory.update_inplace(np.full(memory.shape(), np.nan, np.float32))
    assert np.array_equal(generator.greedy(prompts, names, 12), expected)


def test_calls_that_interleave(generator: TextGenerator) -> None:
    """Two streams in turn, in one thread: each has a cache of its own."""
    batches = [_batch([5, 9], seed) for seed in range(4)]
    alone = [
        [(one.row, one.token) for one in generator.stream(*batch, max_new_tokens=6)]
        for batch in batches
    ]
    streams = [generator.stream(*batch, max_new_tokens=6) for batch in batches]
    found: list[list[tuple[int, int]]] = [[] for _ in batches]
    for step in zip(*streams, strict=True):
        for own, one in zip(found, step, strict=True):
            own.append((one.row, one.token))
    assert found == alone
    del streams
    generator.greedy(*batches[0], 2)
    assert len(_caches(generator)) <= 3  # those of a burst do not stay


def test_a_stream_that_is_dropped_gives_its_cache_back(generator: TextGenerator) -> None:
    prompts, names = _batch([5, 9])
    stream = generator.stream(prompts, names, max_new_tokens=6)
    next(stream)
    assert _caches(generator) == []
    del stream
    assert len(_caches(generator)) == 1


def test_warm_up(generator: TextGenerator, genai: TextGenerator) -> None:
    generator.warm_up(3, 30)
    assert _sizes(generator) == [[(4, 32)]]
    generator.greedy(*_batch([3, 20, 2]), 12)
    assert _sizes(generator) == [[(4, 32)]]
    generator.warm_up(1, CONTEXT)
    genai.warm_up(1, CONTEXT)  # nothing to do there
    for rows, length in ((0, 9), (1, 1), (1, CONTEXT + 1)):
        with pytest.raises(
            lr.InputError, match=f"{rows} rows of {length} tokens; expected 1 row or more, of 2 to"
        ):
            generator.warm_up(rows, length)


def test_a_row_does_not_depend_on_the_others(generator: TextGenerator) -> None:
    prompts, names = _batch([6, 11, 3, 8, 2])
    together = generator.greedy(prompts, names, 8)
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        assert np.array_equal(generator.greedy([prompt], [name], 8)[0], together[row])


def test_sampling_draws_only_for_the_rows_of_the_batch(generator: TextGenerator) -> None:
    """The same tokens whether rows were added to fill up a size or not."""
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 5.0, "seed": 3}
    prompts, names = _batch([6, 11, 3])
    found = generator.generate(prompts, adapters=names, **options)
    assert found == generator.generate(prompts, adapters=names, **options)
    assert found != generator.generate(prompts, adapters=names, **(options | {"seed": 4}))


def test_a_graph_whose_past_and_present_are_apart(artifact: Path, tmp_path: Path) -> None:
    config = (artifact / "generator/genai_config.json").read_text()
    key = '"past_present_share_buffer": '
    apart = config.replace(f"{key}true", f"{key}false")
    assert apart != config
    (tmp_path / "genai_config.json").write_text(apart)
    with pytest.raises(lr.ProviderError, match="past and present of this graph do not share a bu"):
        driven.DrivenEngine(tmp_path, PAD, "cpu", capture=False)


def test_a_graph_that_cannot_be_captured(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise lr.ProviderError("onnxruntime cannot open this graph: it has control flow")

    monkeypatch.setattr(driven.devices, "open_session", refuse)
    with pytest.raises(lr.ProviderError, match=r"control flow. If its steps .* cuda_graphs=False"):
        driven.DrivenEngine(artifact / "generator", PAD, "cpu", capture=True)
    with pytest.raises(lr.ProviderError, match=r"control flow$"):
        driven.DrivenEngine(artifact / "generator", PAD, "cpu", capture=False)


# What comes next


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_graph_of_the_top_tokens_is_onnx(dtype: str) -> None:
    model = onnx.load_from_string(top_tokens._graph(dtype))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("TopK") == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", [1, 7, 200])
@pytest.mark.parametrize("vocabulary", [300, 512, 211])  # 100 parts of 3, 128 of 4, one of 211
def test_the_top_tokens(dtype: str, vocabulary: int, count: int) -> None:
    shape = (3, 2, vocabulary)
    logits = np.random.default_rng(0).standard_normal(shape).astype(NUMPY_DTYPES[dtype])
    value = ort.OrtValue.ortvalue_from_numpy(logits.copy())
    top = TopTokens(dtype, vocabulary, CPU)
    bound = top.bind(value.data_ptr(), shape, np.array([5, 0]), count)
    for own in (logits, -logits):
        value.update_inplace(host_value(own, dtype))
        values, tokens = bound.run()
        rows = own.reshape(6, vocabulary)[[5, 0]].astype(np.float32)
        # The lower one of two tokens that are equally likely comes first.
        assert np.array_equal(tokens, np.argsort(-rows, axis=1, kind="stable")[:, :count])
        assert np.array_equal(values, np.take_along_axis(rows, tokens, axis=1))


class _Drawn:
    """Stands for numpy's random generator: what it draws is given."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = np.array(numbers)

    def random(self, size: int) -> np.ndarray:
        assert size == len(self._numbers)
        return self._numbers


def _choose(sampling: Sampling, shares: list[float], *drawn: float) -> list[int]:
    logits = np.tile(np.log(np.array(shares)).astype(np.float32), (len(drawn), 1))
    tokens = np.tile(np.arange(len(shares)) + 10, (len(drawn), 1))
    random: Any = _Drawn(*drawn)
    return choose(sampling, logits, tokens, random).tolist()


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
    assert _choose(Sampling(), [0.5, 0.3], 0.999) == [10]
    sizes = [Sampling(1.0, top_k=top_k).num_candidates(300) for top_k in (0, 1, 50, 400)]
    assert sizes == [300, 1, 50, 300]
    assert Sampling(0.0).num_candidates(300) == 1


def test_logits_that_are_minus_infinity_or_far_apart() -> None:
    logits = np.array([[90.0, -90.0, -np.inf]], np.float32)
    random: Any = _Drawn(0.9999)
    assert choose(Sampling(0.01), logits, np.array([[4, 5, 6]]), random).tolist() == [4]
