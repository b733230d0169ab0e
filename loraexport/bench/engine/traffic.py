"""Requests that all come at once: in the running engine, in batches of it, in onnxruntime-genai."""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from loraexport_runtime.generation.engine import RequestEngine
from loraexport_runtime.slots.lease import RowUse

from ..contest import check_agreement, reason_of
from ..contestants.decoder_graphs import DecoderGraphs
from ..results import EngineCase, Figure
from ..workloads.schema import EngineWorkload, Traffic
from .asks import FIRST_TOKEN, Ask, draw_traffic
from .timed import Runs, TimedRunner, make_runner, warm_engine

ENGINE, STATIC, GENAI = "engine", "engine static", "GenAI static"
_COMPARED = 2
"""New tokens of each request, as of kind generation."""
_WARM, _STEPS = 3, 25
"""Steps of each size that are timed alone, after some that are not."""

Answer = Callable[[Sequence[Ask]], list[np.ndarray]]
"""Requests -> the new tokens of each, int64 [n]."""


@dataclass
class _Way:
    """How a round's requests are answered, and what that took."""

    answer: Answer
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Seconds of a processor, which others on the machine do not change."""
    runs: list[Runs] = field(default_factory=list)


def measure_traffic(
    graphs: DecoderGraphs, workload: EngineWorkload, traffic: Traffic
) -> EngineCase:
    """Tokens/s of each way, in rounds that alternate them, and what the engine's runs take alone.

    Static batches are as many requests as there are rows, in order of arrival; each batch lasts
    until its longest row ends.

    Raises:
        ParityError: two ways gave other first tokens.
    """
    lab = graphs.lab
    length = max(traffic.prompt_tokens) + max(traffic.new_tokens)

    def draw(turn: int) -> list[Ask]:
        vocabulary, seed = int(graphs.config["vocab_size"]), lab.bench.seed
        return draw_traffic(workload, traffic, graphs.adapters, vocabulary, seed, turn)

    asks = draw(0)
    with warm_engine(graphs, workload.rows, length, workload.quota) as (engine, runner):
        ways = {
            ENGINE: _Way(lambda asks: answer_all(engine, asks)),
            STATIC: _Way(lambda asks: _in_batches(asks, workload.rows, engine)),
            GENAI: _Way(lambda asks: _with_genai(asks, workload.rows, graphs)),
        }
        unwanted: set[str] = {*workload.leave_out}
        if traffic.requests <= workload.rows:
            unwanted.add(STATIC)  # one batch, as in the engine itself
        ways = {name: way for name, way in ways.items() if name not in unwanted}
        left_out = _warm_up(ways, draw(lab.bench.rounds)[: 2 * workload.rows])
        gc.collect()
        gc.freeze()  # to look at all that made the graphs takes 0.4 s, of whichever way it falls on
        for turn in range(lab.bench.rounds):
            outputs = _round(ways, draw(turn), turn, runner)
            where = f"workload {workload.name!r}, {traffic.requests} requests"
            check_agreement(where, outputs, dict.fromkeys(outputs, "mixed"), lab.bench.dtype)
    gc.unfreeze()
    seconds = ways[ENGINE].seconds
    middle = int(np.argsort(seconds)[len(seconds) // 2])
    alone = _Alone(graphs, workload.rows, length, asks)
    figures = [
        *_rates(ways, sum(ask.new_tokens for ask in asks), lab.device.kind == "cpu"),
        *_shares(alone, ways[ENGINE].runs[middle], seconds[middle]),
    ]
    return EngineCase(
        workload=workload.name,
        case="traffic",
        adapters=graphs.adapters,
        rank=graphs.rank,
        rows=workload.rows,
        figures=tuple(figures),
        left_out=left_out,
    )


def _warm_up(ways: dict[str, _Way], asks: Sequence[Ask]) -> dict[str, str]:
    """Answer some requests in each way; who cannot is taken out, and this is why."""
    left_out = {}
    for name, way in list(ways.items()):
        try:
            way.answer(asks)
        except Exception as error:  # another library's refusal is what the table shows
            if name != GENAI:
                raise
            left_out[name] = reason_of(error)
            del ways[name]
    return left_out


def _round(
    ways: dict[str, _Way], asks: Sequence[Ask], turn: int, runner: TimedRunner
) -> dict[str, np.ndarray]:
    """Time each way, the order turned by one; the first new tokens, int64 [requests, 2]."""
    names, first, outputs = list(ways), turn % len(ways), {}
    for name in names[first:] + names[:first]:
        way, runner.runs = ways[name], Runs()
        begin, used = time.perf_counter(), time.process_time()
        tokens = way.answer(asks)
        way.seconds.append(time.perf_counter() - begin)
        way.processor.append(time.process_time() - used)
        way.runs.append(runner.runs)
        outputs[name] = np.stack([new[:_COMPARED] for new in tokens])
    return outputs


def answer_all(engine: RequestEngine, asks: Sequence[Ask]) -> list[np.ndarray]:
    """All of them at once."""
    handles = engine.submit_all([ask.request() for ask in asks])
    answers = [handle.result().answers[0].tokens for handle in handles]
    return [np.array([token.token for token in tokens]) for tokens in answers]


def _in_batches(asks: Sequence[Ask], rows: int, engine: RequestEngine) -> list[np.ndarray]:
    batches = (asks[at : at + rows] for at in range(0, len(asks), rows))
    return [tokens for batch in batches for tokens in answer_all(engine, batch)]


def _with_genai(asks: Sequence[Ask], rows: int, graphs: DecoderGraphs) -> list[np.ndarray]:
    batches = (asks[at : at + rows] for at in range(0, len(asks), rows))
    return [tokens for batch in batches for tokens in _genai_batch(batch, graphs)]


def _genai_batch(asks: Sequence[Ask], graphs: DecoderGraphs) -> list[np.ndarray]:
    """Prompts padded on the right: positions count from the first column."""
    model = graphs.genai("mixed")
    longest, steps = (
        max(sizes)
        for sizes in zip(*((len(ask.tokens), ask.new_tokens) for ask in asks), strict=True)
    )
    params = model.og.GeneratorParams(model.model)
    # No row ends early, whatever its tokens.
    total = longest + steps
    params.set_search_options(batch_size=len(asks), max_length=total, min_length=total)
    generator = model.og.Generator(model.model, params)
    generator.set_model_input("adapter_ids", np.array([ask.slot for ask in asks]))
    padded = np.full((len(asks), longest), graphs.config["pad_token_id"], dtype=np.int32)
    for row, ask in enumerate(asks):
        padded[row, : len(ask.tokens)] = ask.tokens
    generator.append_tokens(padded)
    for _ in range(steps):
        generator.generate_next_token()
    sequences = (generator.get_sequence(row) for row in range(len(asks)))
    rows = [np.array(sequence, dtype=np.int64) for sequence in sequences]
    return [row[longest : longest + ask.new_tokens] for row, ask in zip(rows, asks, strict=True)]


class _Alone:
    """The runs of an engine without the engine: steps of each size, and prompts in full batches."""

    def __init__(self, graphs: DecoderGraphs, rows: int, length: int, asks: Sequence[Ask]) -> None:
        self._runner = make_runner(graphs, rows, length)
        self._asks = asks
        # A step costs more, the more its rows hold: these hold what they do on the mean.
        means = [len(ask.tokens) + ask.new_tokens / 2 for ask in asks]
        self._length = min(int(np.mean(means)), length - _WARM - _STEPS)

    def step(self, rows: int) -> float:
        """Median seconds of a step of so many rows."""
        runner = self._runner
        for goes_on in (False, True):
            for row in range(rows):
                use = RowUse(self._asks[row].slot)
                runner.inputs.put(row, FIRST_TOKEN, self._length, use, goes_on=goes_on)
            if not runner.has_step(rows):
                runner.make_step(rows)
        runner.runs = Runs()
        for _ in range(_WARM + _STEPS):
            runner.step(rows)
        return median(seconds for _, seconds in runner.runs.steps[_WARM:])

    def prompts(self) -> float:
        """Seconds for all prompts in full batches, those of like length together."""
        asks = sorted(self._asks, key=lambda ask: len(ask.tokens))
        total = 0.0
        for at in range(0, len(asks), self._runner.rows):
            batch = asks[at : at + self._runner.rows]
            tokens = [ask.tokens for ask in batch]
            uses, sizes = [RowUse(ask.slot) for ask in batch], [len(one) for one in tokens]
            self._runner.runs = Runs()
            for _ in range(2):  # the first one meets these shapes for the first time
                self._runner.read(range(len(batch)), tokens, uses, 0, sizes)
            total += self._runner.runs.reads[-1][1]
        return total

    def release(self) -> None:
        self._runner.release()


def _rates(ways: dict[str, _Way], tokens: int, on_host: bool) -> Iterator[Figure]:
    middle = {name: median(way.seconds) for name, way in ways.items()}
    for name, seconds in middle.items():
        yield Figure(name=name, unit="tokens/s", value=tokens / seconds)
    for name in (STATIC, GENAI):
        if name in middle:
            ratio = middle[name] / middle[ENGINE]
            yield Figure(name=f"{ENGINE} / {name}, tokens/s", unit="ratio", value=ratio)
    if not on_host:
        return
    used = {name: median(way.processor) for name, way in ways.items()}
    for name, seconds in used.items():
        yield Figure(name=f"{name}, of a processor", unit="s", value=seconds)
        if name != ENGINE:
            ratio = seconds / used[ENGINE]
            yield Figure(name=f"{name} / {ENGINE}, of a processor", unit="ratio", value=ratio)


def _shares(alone: _Alone, runs: Runs, seconds: float) -> Iterator[Figure]:
    """How much of an engine's time its runs take, as they are alone and as they were in it."""
    counts = Counter(rows for rows, _ in runs.steps)
    try:
        times = {rows: alone.step(rows) for rows in sorted(counts)}
        prompts = alone.prompts()
    finally:
        alone.release()
    steps = sum(number * times[rows] for rows, number in counts.items())
    for rows, time_s in times.items():
        yield Figure(name=f"a step of {rows} rows alone", unit="ms", value=1e3 * time_s)
    yield Figure(name="steps made", unit="count", value=len(runs.steps))
    yield Figure(name="all steps, alone", unit="s", value=steps)
    yield Figure(name="all steps, in the engine", unit="s", value=sum(s for _, s in runs.steps))
    yield Figure(name="all prompts in full batches, alone", unit="s", value=prompts)
    yield Figure(name="all prompts, in the engine", unit="s", value=sum(s for _, s in runs.reads))
    yield Figure(name="the engine's whole time", unit="s", value=seconds)
    share = (steps + prompts) / seconds
    yield Figure(name="steps and prompts alone / whole time", unit="ratio", value=share)
