"""The engine that captures CUDA graphs, on the CPU without them: its caches, its choice of tokens.

tests/parity/test_decoder.py runs it through every test of the interface, test_next_inputs.py the
nodes that it adds to the graph; tests/gpu captures.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.decoders import CONTEXT, PAD, VOCABULARY, open_driven, write_family
from support.home import Home

import loraexport_runtime as lr
from loraexport_runtime.device.dtypes import NUMPY_DTYPES
from loraexport_runtime.device.memory import host_value
from loraexport_runtime.generation.captured import engine as driven
from loraexport_runtime.generation.captured import top_tokens
from loraexport_runtime.generation.captured.cache import Cache
from loraexport_runtime.generation.captured.step import Step
from loraexport_runtime.generation.captured.top_tokens import TopTokens
from loraexport_runtime.generation.engine import Sampling
from loraexport_runtime.generation.generator import TextGenerator
from loraexport_runtime.generation.load import load_generator
from loraexport_runtime.generation.sampling import choose

CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
NAMES = (None, "first", "second")


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    return home.artifact(write_family, "Qwen2")


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
        driven.DrivenEngine(tmp_path, PAD, CPU, capture=False)


def test_a_graph_that_cannot_be_captured(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise lr.ProviderError("onnxruntime cannot open this graph: it has control flow")

    monkeypatch.setattr(driven, "open_session", refuse)
    with pytest.raises(lr.ProviderError, match=r"control flow. If its steps .* cuda_graphs=False"):
        driven.DrivenEngine(artifact / "generator", PAD, CPU, capture=True)
    with pytest.raises(lr.ProviderError, match=r"control flow$"):
        driven.DrivenEngine(artifact / "generator", PAD, CPU, capture=False)


# Steps that go on by themselves


def _start(
    generator: TextGenerator, lengths: list[int], steps: int, sampling: Sampling | None = None
) -> tuple[list[list[int]], np.ndarray, Iterator[np.ndarray]]:
    """Prompts, their slots, and the tokens after them: so many, past any end of text."""
    prompts, names = _batch(lengths, len(lengths))
    slots = np.array([generator.adapters.get(name or "", 0) for name in names])
    engine: Any = generator._engine
    return prompts, slots, engine.start(prompts, slots, steps, sampling or Sampling())


@pytest.fixture(scope="module")
def alone(artifact: Path) -> ort.InferenceSession:
    """The graph as it was built."""
    return ort.InferenceSession(
        artifact / "generator/model.onnx", providers=["CPUExecutionProvider"]
    )


def _ranks(
    alone: ort.InferenceSession, prompt: list[int], slot: int, tokens: list[int]
) -> list[int]:
    """How many tokens are likelier than each of these, by one run over all of them."""
    ids = np.array([[*prompt, *tokens]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "adapter_ids": np.array([slot])}
    for one in alone.get_inputs():
        if one.name.startswith("past_key_values"):
            feeds[one.name] = np.zeros((1, one.shape[1], 0, 16), np.float32)
    logits = alone.run(["logits"], feeds)[0][0, len(prompt) - 1 : -1]
    return [int((row > row[token]).sum()) for row, token in zip(logits, tokens, strict=True)]


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [
        ([5, 1, 17], 30),
        ([9], 7),  # to the end of 16 places
        ([4, 20, 9, 1, 13, 2], 12),
        ([3, CONTEXT - 20, 11], 20),  # to the end of the context
        ([7, 2, 30], 1),
    ],
)
def test_greedy_tokens_are_the_likeliest(
    generator: TextGenerator, alone: ort.InferenceSession, lengths: list[int], steps: int
) -> None:
    for _ in range(2):
        prompts, slots, taken = _start(generator, lengths, steps)
        found = np.stack(list(taken), axis=1)
        assert found.shape == (len(lengths), steps)
        for prompt, slot, own in zip(prompts, slots, found.tolist(), strict=True):
            assert _ranks(alone, prompt, slot, own) == [0] * steps


def test_drawn_tokens_are_among_the_likeliest(
    generator: TextGenerator, alone: ort.InferenceSession
) -> None:
    """A step goes on from the token that was drawn, not from the likeliest."""
    prompts, slots, taken = _start(generator, [5, 1, 17], 30, Sampling(50.0, top_k=3, seed=0))
    found = np.stack(list(taken), axis=1).tolist()
    every = [_ranks(alone, *row) for row in zip(prompts, slots, found, strict=True)]
    assert {rank for row in every for rank in row} == {0, 1, 2}


def test_greedy_and_drawn_tokens_in_turn(generator: TextGenerator) -> None:
    drawn = Sampling(5.0, seed=3)
    calls = [([5, 9], 9, None), ([3, 1, 8], 12, drawn), ([2], 5, None), ([6, 6], 7, drawn)]
    wanted = [np.stack(list(_start(generator, *call)[2])).tolist() for call in calls]
    streams = [_start(generator, *call)[2] for call in calls]
    found: list[list[list[int]]] = [[] for _ in calls]
    for _ in range(12):
        for own, stream in zip(found, streams, strict=True):
            own.extend(tokens.tolist() for tokens in [next(stream, None)] if tokens is not None)
    assert found == wanted


@pytest.mark.parametrize("taken", range(6))
def test_a_cache_whose_stream_was_closed_early(generator: TextGenerator, taken: int) -> None:
    """Perhaps a step of it runs still: the next call, of the same size or not, does not notice."""
    wanted = {length: np.stack(list(_start(generator, [length, 3], 6)[2])) for length in (8, 12)}
    for length in (8, 12, 12, 8):
        stream = _start(generator, [5, 9], 6)[2]
        for _ in range(taken):
            next(stream)
        stream.close()
        assert np.array_equal(np.stack(list(_start(generator, [length, 3], 6)[2])), wanted[length])
    assert len(_caches(generator)) == 1


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Grows with every step that runs."""
    found: list[Step] = []
    run = Step.run

    def count(step: Step) -> None:
        found.append(step)
        run(step)

    monkeypatch.setattr(Step, "run", count)
    return found


def _wait(generator: TextGenerator) -> None:
    engine: Any = generator._engine
    engine._do(lambda: None)


def test_a_greedy_stream_is_one_step_ahead(generator: TextGenerator, runs: list[Step]) -> None:
    stream = _start(generator, [5, 9], 4)[2]
    for ran in (1, 2, 3, 3):
        next(stream)
        _wait(generator)
        assert len(runs) == ran  # the prompts gave the first token
    assert list(stream) == []
    _wait(generator)
    assert len(runs) == 3
    next(_start(generator, [5, 9], 1)[2])
    next(_start(generator, [5, 9], 4, Sampling(1.0))[2])
    _wait(generator)
    assert len(runs) == 3


def test_a_step_that_has_not_begun_when_its_stream_is_closed(
    generator: TextGenerator, runs: list[Step]
) -> None:
    engine: Any = generator._engine
    stream = _start(generator, [5, 9], 6)[2]
    next(stream)
    gate = Event()
    engine._worker.submit(gate.wait)
    next(stream)  # and the third token's step is behind the gate
    stream.close()
    assert len(_caches(generator)) == 1
    gate.set()
    _wait(generator)
    assert len(runs) == 1


def test_no_step_follows_one_that_failed(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = np.stack(list(_start(generator, [5, 9], 6)[2]))
    run, ran = Step.run, []

    def fail(step: Step) -> None:
        ran.append(step)
        if len(ran) == 2:
            raise RuntimeError("out of memory")
        run(step)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", fail)
        stream = _start(generator, [5, 9], 6)[2]
        assert np.array_equal(np.stack([next(stream), next(stream)]), wanted[:2])
        with pytest.raises(RuntimeError, match="out of memory"):
            next(stream)
        _wait(generator)
        assert len(ran) == 2
    assert np.array_equal(np.stack(list(_start(generator, [5, 9], 6)[2])), wanted)


class _Capturing:
    """A session that runs a graph twice to capture it, as onnxruntime does on CUDA."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.captured: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: ort.RunOptions) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        if number != "-1" and number not in self.captured:
            self.captured.add(number)
            self._session.run_with_iobinding(binding, options)
        self._session.run_with_iobinding(binding, options)

    def release_captured_graph(self, number: int) -> None:
        self.captured.remove(str(number))


def test_runs_that_capture_advance_no_batch(
    artifact: Path, genai: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driven, "_LENGTHS", 16)
    generator, open_session = open_driven(artifact), driven.open_session
    monkeypatch.setattr(driven, "open_session", lambda *own: _Capturing(open_session(*own)))
    engine: Any = driven.DrivenEngine(artifact / "generator", PAD, CPU, capture=True)
    generator._engine = engine
    for lengths in ([3, 20, 2], [1], [9, 30, 4, 17, 1], [3, 20, 2]):
        batch = _batch(lengths)
        assert np.array_equal(generator.greedy(*batch, 12), genai.greedy(*batch, 12)), lengths
    _wait(generator)
    assert engine._graph.session.captured == {"3", "4"}  # the others went with a smaller memory


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
    sizes = [Sampling(1.0, top_k=top_k).num_candidates(300) for top_k in (0, 1, 50, 400)]
    assert sizes == [300, 1, 50, 300]


def test_logits_that_are_minus_infinity_or_far_apart() -> None:
    logits = np.array([[90.0, -90.0, -np.inf]], np.float32)
    random: Any = _Drawn(0.9999)
    assert choose(Sampling(0.01), logits, np.array([[4, 5, 6]]), random).tolist() == [4]
