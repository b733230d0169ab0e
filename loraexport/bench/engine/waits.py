"""Time to first token: of a short prompt beside a long one, and of a chat's second turn."""

import time
from statistics import median

import numpy as np

from loraexport_runtime.generation.engine import RequestEngine
from loraexport_runtime.generation.handle import GenerationHandle

from ...errors import UsageError
from ..contestants.decoder_graphs import DecoderGraphs
from ..results import EngineCase, Figure
from ..workloads.schema import Arrival, Chat, EngineWorkload
from .asks import Ask, draw_tokens
from .timed import Runs, TimedRunner, warm_engine

_STEPS = 4
"""Of a round, between two chunks."""
_LATEST = 0.7
"""Of a long prompt's time, at which a short one comes at the latest."""
_PATIENCE_S = 120.0


class _Client:
    """Draws prompts, and asks an engine."""

    def __init__(self, graphs: DecoderGraphs, engine: RequestEngine) -> None:
        self.engine = engine
        self.generator = np.random.default_rng(graphs.lab.bench.seed)
        self._vocabulary, self._adapters = int(graphs.config["vocab_size"]), graphs.adapters
        self._count = 0

    def draw(self, size: int) -> np.ndarray:
        """int64 [size], which no row of the cache holds."""
        return draw_tokens(self.generator, size, self._vocabulary)

    def submit(self, size: int, new_tokens: int) -> GenerationHandle:
        """A new prompt, each adapter in turn."""
        self._count += 1
        slot = 1 + self._count % self._adapters
        return self.engine.submit(Ask(self.draw(size), slot, new_tokens).request())


def first_token(handle: GenerationHandle) -> float:
    """When it came, by `time.perf_counter`."""
    next(iter(handle))
    return time.perf_counter()


def measure_arrival(
    graphs: DecoderGraphs, workload: EngineWorkload, arrival: Arrival
) -> EngineCase:
    """Time to first token of prompts that come while rows decode and a long prompt is read, beside
    one chunk, a round's steps and the prompt's own run, as they took at the same time."""
    room = min(int(graphs.config["context_length"]), arrival.long_prompt_tokens + 256)
    with warm_engine(graphs, workload.rows, room, workload.quota) as (engine, runner):
        client = _Client(graphs, engine)
        waits, runs, late = _arrivals(client, runner, arrival)
        filled_up = runner.prompts.joined_tokens(1, arrival.prompt_tokens)
    if len(waits) < arrival.times // 2:
        raise UsageError(
            f"workload {workload.name!r}: {late} of {arrival.times} short prompts came when the"
            " long one had been read; make long_prompt_tokens larger"
        )
    chunk = median(seconds for tokens, seconds in runs.reads if tokens == workload.quota)
    own = median(seconds for tokens, seconds in runs.reads if tokens == filled_up)
    most = max(rows for rows, _ in runs.steps)
    step = median(seconds for rows, seconds in runs.steps if rows == most)
    p95, bound = float(np.percentile(waits, 95)), chunk + _STEPS * step + own
    return _case(
        graphs,
        workload,
        "arrival",
        {
            "first token of a short prompt, median": (1e3 * median(waits), "ms"),
            "first token of a short prompt, p95": (1e3 * p95, "ms"),
            f"a chunk of {workload.quota} tokens, median": (1e3 * chunk, "ms"),
            f"a step of {most} rows, median": (1e3 * step, "ms"),
            "the short prompt's own run, median": (1e3 * own, "ms"),
            f"p95 / (chunk + {_STEPS} steps + own run)": (p95 / bound, "ratio"),
            "prompts that came": (len(waits), "count"),
        },
    )


def _arrivals(
    client: _Client, runner: TimedRunner, arrival: Arrival
) -> tuple[list[float], Runs, int]:
    """Seconds of each that came while the long prompt was read, what ran meanwhile, and how many
    came too late."""
    waits: list[float] = []
    runs = Runs()
    late, reading = 0, 0.0
    for turn in range(-2, arrival.times):  # the first two are not counted
        # Begun anew each time: a step costs more, the more its rows hold.
        new_tokens = runner.length - arrival.prompt_tokens
        decoding = [
            client.submit(arrival.prompt_tokens, new_tokens) for _ in range(arrival.decoding)
        ]
        for handle in decoding:
            first_token(handle)
        runner.runs = Runs()
        long = client.submit(arrival.long_prompt_tokens, 2)
        begin = _began(long)
        if turn >= -1:
            time.sleep(float(client.generator.uniform(0, _LATEST * reading)))
        came = time.perf_counter()
        short = client.submit(arrival.prompt_tokens, 2)
        took = first_token(short) - came
        read = first_token(long)
        if turn == -2:
            reading = read - begin
        elif turn >= 0 and came + took < read:
            waits.append(took)
            runs.steps += runner.runs.steps
            runs.reads += runner.runs.reads
        late += turn >= 0 and came + took >= read
        for handle in decoding:
            handle.cancel()
        for handle in (long, short, *decoding):
            handle.result(_PATIENCE_S)
    return waits, runs, late


def _began(handle: GenerationHandle) -> float:
    """Wait until its prompt is being read."""
    end = time.perf_counter() + _PATIENCE_S
    while handle.began is None and time.perf_counter() < end:
        time.sleep(0.0002)
    return time.perf_counter()


def measure_chat(graphs: DecoderGraphs, workload: EngineWorkload, chat: Chat) -> EngineCase:
    """Time to first token of a chat's second turn over that of the first one."""
    length = chat.prompt_tokens + 3 * chat.new_tokens
    firsts, seconds, reused = [], [], []
    with warm_engine(graphs, workload.rows, length, workload.quota) as (engine, _):
        client = _Client(graphs, engine)
        for index in range(-1, chat.times):  # the first one meets its shapes for the first time
            slot = 1 + index % graphs.adapters
            text = client.draw(chat.prompt_tokens)
            waits = []
            for _ in range(2):
                begin = time.perf_counter()
                handle = engine.submit(Ask(text, slot, chat.new_tokens).request())
                waits.append(first_token(handle) - begin)
                done = handle.result(_PATIENCE_S)
                answer = [token.token for token in done.answers[0].tokens]
                text = np.concatenate([text, answer, client.draw(chat.new_tokens)])
            if index >= 0:
                firsts.append(waits[0])
                seconds.append(waits[1])
                reused.append(done.reused_tokens)
    ratio = median(seconds) / median(firsts)
    return _case(
        graphs,
        workload,
        "chat",
        {
            "first turn, time to first token": (1e3 * median(firsts), "ms"),
            "second turn, time to first token": (1e3 * median(seconds), "ms"),
            "tokens that the second turn did not read again": (min(reused), "count"),
            "second turn / first turn": (ratio, "ratio"),
        },
    )


def _case(
    graphs: DecoderGraphs,
    workload: EngineWorkload,
    case: str,
    figures: dict[str, tuple[float, str]],
) -> EngineCase:
    return EngineCase.model_validate(
        {
            "workload": workload.name,
            "case": case,
            "adapters": graphs.adapters,
            "rank": graphs.rank,
            "rows": workload.rows,
            "figures": tuple(
                Figure(name=name, unit=unit, value=value)  # type: ignore[arg-type]
                for name, (value, unit) in figures.items()
            ),
        }
    )
