"""Whose prompts an engine reads in a round, and which of them in one run."""

from typing import Any

import numpy as np
import pytest

from loraexport_runtime.generation.handle import GenerationHandle
from loraexport_runtime.generation.loop import reading
from loraexport_runtime.generation.loop.jobs import Answer, Job
from loraexport_runtime.generation.loop.reading import MOST_QUOTAS, PromptOrder
from loraexport_runtime.generation.loop.rows import Rows
from loraexport_runtime.generation.request import GenerationRequest
from loraexport_runtime.generation.sampling import Sampler

QUOTA, MOST = 64, 128


@pytest.fixture(autouse=True)
def _cheap_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LAUNCHES", 16)


def _answer(size: int, order: int, goes_on: bool) -> Answer:
    prompt = np.arange(size)
    request = GenerationRequest(tokens=prompt.tolist())
    handle = GenerationHandle(1, size, lambda: None, lambda: None)
    answer = Answer(
        Job(request, prompt, handle, None, 1), 0, Sampler(request, prompt), frozenset(), None
    )
    answer.order, answer.goes_on = order, goes_on
    return answer


def _joined(num: int, tokens: int) -> int | None:
    """Filled up to a multiple of 8 tokens."""
    size = num * -(-tokens // 8) * 8
    return size if num == 1 or size <= MOST else None


def _round(sizes: list[int], decoding: int = 0, joins: bool = True) -> list[list[int]]:
    """The rows of each run of one round, which reads what it gives; the first rows decode."""
    rows = Rows[Answer].make(decoding + len(sizes), 1024)
    for row, size in zip(rows.rows, [8] * decoding + sizes, strict=True):
        row.user = _answer(size, row.index, row.index < decoding)
    order = PromptOrder(rows, QUOTA, _joined if joins else None)
    runs = []
    for run in order.round():
        runs.append([row.index for row in run])
        for row in run:
            row.num_read = order.chunk_end(row)
            answer: Any = row.user
            answer.goes_on = row.num_read == len(answer.prompt)
    return runs


def test_the_shortest_come_first_until_the_quota_is_used_up() -> None:
    assert _round([60, 20, 30], decoding=3, joins=False) == [[4], [5]]


def test_prompts_are_one_run_where_that_takes_less_time() -> None:
    """Wherever their rows are: where what fills them up is less than a run costs by itself."""
    assert _round([16, 60, 25, 60, 9], decoding=5) == [[9, 5], [7], [6]]


def test_prompts_that_are_read_together_count_half_of_the_quota() -> None:
    assert _round([30] * 8, decoding=8) == [[8, 9, 10, 11]]
    assert _round([30] * 8, decoding=8, joins=False) == [[8], [9]]


@pytest.mark.parametrize(
    ("waiting", "decoding", "quotas"),
    [(6, 6, 1), (6, 4, 1), (6, 3, 2), (6, 2, 3), (6, 1, 6), (3, 0, 3), (12, 0, MOST_QUOTAS)],
)
def test_a_round_reads_more_where_few_rows_decode(waiting: int, decoding: int, quotas: int) -> None:
    """A step takes as long for one row as for all of them."""
    runs = _round([QUOTA] * waiting, decoding, joins=False)
    assert sum(map(len, runs)) == quotas


def test_a_run_has_a_bound_of_its_own() -> None:
    """A sixth prompt makes it 6 x 24 tokens, more than `MOST`."""
    assert _round([20] * 12) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_a_long_prompt_is_read_chunk_by_chunk() -> None:
    """As many chunks in a round as it may have beside the rows that decode."""
    assert _round([5 * QUOTA], decoding=1) == [[1]]
    assert _round([5 * QUOTA, 5 * QUOTA, 5 * QUOTA], decoding=1) == [[1]] * 3
