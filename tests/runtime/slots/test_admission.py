"""Who is admitted next: fair between tenants, past what is blocked, and bounded."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loraexport_runtime as lr
from loraexport_runtime.slots.admission import PATIENCE, QUANTUM, AdmissionQueue


def admit(value: str, may_page: bool, is_aged: bool) -> bool:
    return True


def make(**tenants: list[int]) -> AdmissionQueue[str]:
    """Items a0, a1, … of a tenant a by their costs."""
    queue = AdmissionQueue[str](10_000, 10**9)
    for name, costs in tenants.items():
        for at, cost in enumerate(costs):
            queue.put([f"{name}{at}"], cost, name, resource=name)
    return queue


def test_one_tenant_is_served_in_order() -> None:
    queue = make(a=[5, 5000, 7])
    assert [queue.take(admit) for _ in range(4)] == ["a0", "a1", "a2", None]
    assert queue.sizes() == (0, 0)


def test_a_flood_delays_itself_alone() -> None:
    queue = make(flood=[QUANTUM] * 100, b=[QUANTUM] * 2, c=[QUANTUM])
    order = [queue.take(admit) for _ in range(8)]
    assert {"b0", "c0", "flood0"} == set(order[:3])
    assert "b1" in order[3:5]
    assert order[5:] == ["flood2", "flood3", "flood4"]
    assert queue.sizes() == (95, 95 * QUANTUM)


def test_turns_are_worth_tokens_and_not_requests() -> None:
    queue = make(long=[4 * QUANTUM] * 20, short=[QUANTUM // 4] * 200)
    taken = [str(queue.take(admit)) for _ in range(100)]
    longs = sum(name.startswith("long") for name in taken)
    assert abs(longs * 16 - (100 - longs)) <= 16


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.integers(1, 3000), min_size=1, max_size=12), min_size=1
    )
)
def test_while_two_tenants_wait_neither_gets_far_ahead(tenants: dict[str, list[int]]) -> None:
    """By no more than a turn and the largest item of each: Shreedhar and Varghese's bound."""
    queue = make(**tenants)
    served = dict.fromkeys(tenants, 0)
    left = {name: len(costs) for name, costs in tenants.items()}
    largest = max(max(costs) for costs in tenants.values())
    while (value := queue.take(admit)) is not None:
        name = value[0]
        served[name] += tenants[name][int(value[1:])]
        left[name] -= 1
        if all(left.values()):
            assert max(served.values()) - min(served.values()) <= 2 * (QUANTUM + largest)
    assert not any(left.values())
    assert queue.sizes() == (0, 0)


def test_what_is_blocked_blocks_nobody_behind_it() -> None:
    queue = make(a=[5] * 3, b=[5] * 2)
    asked: list[str] = []

    def attempt(value: str, may_page: bool, is_aged: bool) -> bool:
        asked.append(value)
        return value[0] != "a"

    assert [queue.take(attempt) for _ in range(3)] == ["b0", "b1", None]
    assert asked == ["b0", "b1", "a0"]  # of a's items one stands for all
    assert queue.take(admit) == "a0"


def test_whoever_was_passed_over_often_goes_first_and_keeps_slots() -> None:
    queue = make(a=[5], b=[5] * (3 * PATIENCE))
    calls: list[tuple[str, bool, bool]] = []

    def attempt(value: str, may_page: bool, is_aged: bool) -> bool:
        calls.append((value, may_page, is_aged))
        return value[0] != "a"

    while ("a0", True, False) not in calls:
        assert str(queue.take(attempt)).startswith("b")
    for _ in range(PATIENCE - 1):  # it has been passed over once
        calls.clear()
        assert str(queue.take(attempt)).startswith("b")
        assert calls[0][2] is False
    calls.clear()
    assert str(queue.take(attempt)).startswith("b")
    assert [call[1:] for call in calls] == [(True, True), (False, False)]
    assert calls[0][0] == "a0"
    assert queue.take(admit) == "a0"


def test_waiting_for_its_turn_ages_nobody() -> None:
    """Else a tenant's flood would go ahead of all others in the end."""
    queue = make(flood=[QUANTUM] * 300, b=[QUANTUM] * 300)
    taken = [str(queue.take(admit))[0] for _ in range(400)]
    assert abs(taken.count("f") - taken.count("b")) <= 2


def test_bounds() -> None:
    queue = AdmissionQueue[str](3, 100)
    queue.put(["a", "b"], 20, None)
    with pytest.raises(lr.QueueFullError, match="2 requests wait, and 3 may; try again later"):
        queue.put(["c", "d"], 1, None)
    with pytest.raises(
        lr.QueueFullError, match="that wait have 40 tokens, and with 61 more they had more than 100"
    ):
        queue.put(["c"], 61, "x")
    queue.put(["c"], 60, "x")
    assert queue.sizes() == (3, 100)
    assert queue.remove(lambda value: value in "ac") == ["a", "c"]
    assert queue.sizes() == (1, 20)
    for bad in (0, True, 1.5):
        with pytest.raises(lr.InputError, match="expected a number from 1 on"):
            AdmissionQueue[str](bad, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("cost", [1, 100])
def test_who_floods_leaves_room_for_others(cost: int) -> None:
    """By requests, and by tokens."""
    queue = AdmissionQueue[str](900 if cost == 1 else 10_000, 90_000)
    for flood in ("a", "b"):
        fill = partial(queue.put, [flood], cost, flood)
        with pytest.raises(lr.QueueFullError, match=rf"of {flood} wait, and room for \d+ is kept"):
            [fill() for _ in range(901)]
    before = queue.sizes()[0]
    assert 840 <= before < 900
    for at in range(5):
        queue.put(["c"], cost, f"c{at}")
    assert queue.sizes()[0] == before + 5
    while queue.take(admit):
        pass
    queue.put(["a"] * 800, cost, "a")  # what it had is forgotten


def test_what_is_taken_out_of_turn_is_paid_for() -> None:
    """Batches of one tenant's texts, which another's do not fit: it is its turn all the same."""
    queue = make(flood=[100] * 200)
    firsts = []
    for batch in range(6):
        firsts.append(queue.take(admit))
        rest = [queue.take(admit, lambda resource: resource == "flood") for _ in range(8)]
        assert None not in rest
        assert queue.take(admit, lambda resource: resource == "nobody") is None
        if batch % 2 == 0:
            queue.put([f"quiet{batch}"], 5, "quiet", resource="quiet")
    assert firsts[1::2] == ["quiet0", "quiet2", "quiet4"]
