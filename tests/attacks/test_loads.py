"""A small part of `scripts/fuzz --loads`; and that it finds wrong tokens."""

from collections.abc import Callable

import pytest
from fuzzing.loads import LoadsResult, run_loads
from support.decoders import write_tenants
from support.faults import forget_writes
from support.home import Home

PATIENCE_S = 120.0


@pytest.fixture
def cycle(home: Home) -> Callable[[int], LoadsResult]:
    artifact = home.artifact(write_tenants)

    def run(cycles: int) -> LoadsResult:
        return run_loads(artifact, artifact.parents[1], cycles, cycles // 2, PATIENCE_S)

    return run


def test_no_token_is_wrong_beside_loads(cycle: Callable[[int], LoadsResult]) -> None:
    result = cycle(50)
    assert result.findings == []
    assert (result.cycles, result.wrong) == (50, 0)
    assert result.requests + result.unknown >= 100
    assert result.exact > result.requests // 2
    assert result.memory.keys() == {"start", "warm", "end"}


def test_tokens_of_another_adapter_are_found(
    cycle: Callable[[int], LoadsResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth write of a slot does not happen."""
    forget_writes(monkeypatch, whole=8)  # those that the requests alone run with
    result = cycle(5000)
    assert result.wrong > 0
    assert "tokens of" in result.findings[0]
    assert result.cycles < 5000, "the first one ends it"
