"""What a batch costs is learned, and its lengths are chosen by that."""

import random

from loraexport_runtime.batching.choice import LAUNCH, BatchCost


def learned(launch: float) -> BatchCost:
    """Of a machine whose batches cost as much as so many tokens, beside theirs."""
    cost = BatchCost()
    drawn = random.Random(0)
    for _ in range(40):
        tokens = drawn.randint(10, 4000)
        cost.note(tokens, 1e-4 * (launch + tokens) * drawn.uniform(0.99, 1.01))
    return cost


def test_the_cost_of_a_launch_is_learned() -> None:
    for launch in (20.0, 2000.0):
        assert abs(learned(launch).launch / launch - 1) < 0.2
    assert learned(0.0).launch < 10


def test_alike_batches_teach_nothing() -> None:
    cost = BatchCost()
    for _ in range(100):
        cost.note(512, 0.01)
    assert cost.launch == LAUNCH


def test_a_dear_launch_takes_more_lengths() -> None:
    lengths = [4 * step for step in range(1, 33)]
    shares = []
    for launch in (1.0, 100.0, 10_000.0):
        low, high = learned(launch).choose(40, lengths, 32, 100_000)
        assert low <= 40 <= high
        shares.append(sum(low <= length <= high for length in lengths))
    assert shares == sorted(shares)
    assert shares[0] <= 2
    assert shares[-1] >= 16


def test_a_batch_ends_soon_where_more_would_save_little() -> None:
    """Forty texts of one length bring a launch below a twentieth; longer ones beside may wait."""
    cost = learned(20.0)
    assert cost.choose(20, [20] * 39 + [21] * 30, 100, 100_000) == (20, 20)
    assert cost.choose(20, [21] * 30, 100, 100_000)[1] == 21


def test_bounds() -> None:
    cost = learned(10_000.0)
    low, high = cost.choose(10, [10, 10, 11, 90], 32, 100)
    assert (low, high) == (10, 11)
    assert cost.choose(200, [10, 210], 32, 100) == (200, 200)
    assert cost.choose(7, [], 32, 100) == (7, 7)
