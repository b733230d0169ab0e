"""Dimensions of a model's tensors, which may follow from the sequence."""

import pytest

from loraexport_runtime.contract.kinds import TensorEntry, is_dimension, sequence_of


def entry(*shape: str) -> TensorEntry:
    return TensorEntry("y", "float32", shape)


@pytest.mark.parametrize(
    ("dimension", "sizes"),
    [
        ("sequence", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("sequence+5", [6, 7, 8, 9, 10, 11, 12, 13]),
        ("(sequence-1)//3", [0, 0, 0, 1, 1, 1, 2, 2]),
        ("(sequence+1)//3", [0, 1, 1, 1, 2, 2, 2, 3]),
        ("7", [7] * 8),
    ],
)
def test_sizes(dimension: str, sizes: list[int]) -> None:
    found = [entry("batch", dimension).sizes(2, length) for length in range(1, 9)]
    assert found == [[2, size] for size in sizes]


def test_the_shortest_sequence_of_so_many_steps() -> None:
    steps = [entry("batch", "4"), entry("batch", "(sequence-80)//320", "768")]
    assert [sequence_of(steps, count) for count in (1, 2)] == [400, 720]
    assert sequence_of([entry("batch", "sequence+5")], 3) == 3


@pytest.mark.parametrize(
    ("text", "is_input", "is_output"),
    [
        ("batch", True, True),
        ("sequence", True, True),
        ("12", True, True),
        ("2147483648", False, False),
        ("sequence+5", False, True),
        ("(sequence-80)//320", False, True),
        ("(sequence+0)//2", False, True),
        ("(sequence-80)//0", False, False),
        ("(sequence-80)//9999999999", False, False),
        ("sequence+0", False, False),
        ("sequence-5", False, False),
        ("sequence+٣", False, False),
        ("0", False, False),
        ("-1", False, False),
        ("٣", False, False),
        ("sequence*2", False, False),
        ("", False, False),
    ],
)
def test_what_is_a_dimension(text: str, is_input: bool, is_output: bool) -> None:
    found = [is_dimension(text, 2**31 - 1, derived) for derived in (False, True)]
    assert found == [is_input, is_output]
