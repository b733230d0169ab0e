"""What the default run leaves out: at most a tenth of the tests, no recipe, no class of attack."""

from pathlib import Path

import pytest
from support.collected import COLLECTED

TESTS = Path(__file__).parent
RECIPES = {
    "layers": "tests/pipeline/test_specs.py::test_spec_builds_and_serves_a_mixed_batch[quickstart]",
    "model": "tests/pipeline/test_specs.py::test_spec_builds_and_serves_a_mixed_batch[minilm]",
    "graph": "tests/bases/test_graph.py::test_a_mixed_batch_is_what_peft_gives[dynamo]",
    "decoder": "tests/parity/test_decoder.py::test_a_family[Llama]",
}
"""Kind of base -> a test that builds, proves and serves one."""


@pytest.fixture(scope="module")
def collected(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All tests of the repository, marked or not, as conftest kept them."""
    items = request.config.stash[COLLECTED]
    if {item.path for item in items} != set(TESTS.rglob("test_*.py")):
        pytest.skip("only some of the files were collected")
    return items


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def test_at_most_a_tenth_is_slow(collected: list[pytest.Item]) -> None:
    slow = sum(map(is_slow, collected))
    assert slow <= len(collected) / 10, f"{slow} of {len(collected)}"


def test_every_recipe_runs_by_default(collected: list[pytest.Item]) -> None:
    default = {item.nodeid for item in collected if not is_slow(item)}
    assert set(RECIPES.values()) <= default


def test_every_class_of_attack_runs_by_default(collected: list[pytest.Item]) -> None:
    attacks = [item for item in collected if item.path.parent.name == "attacks"]
    slow = {_test_of(item) for item in attacks if is_slow(item)}
    assert slow <= {_test_of(item) for item in attacks if not is_slow(item)}
    assert {item.path for item in attacks} == set((TESTS / "attacks").glob("test_*.py"))


def _test_of(item: pytest.Item) -> str:
    """The test without its parameters."""
    return item.nodeid.partition("[")[0]
