"""The cost model: the work of a strategy by hand, and a fit that finds what it was made from."""

from itertools import product
from pathlib import Path

import pytest

from loraexport.bench.results import read_results
from loraexport.errors import UsageError
from loraexport.plan.costs import (
    WITH_KERNELS,
    LayerShape,
    Measured,
    added,
    fit,
    read_costs,
    work,
)
from loraexport.spec.schema import Costs, CostTerms
from loraexport_runtime.contract.manifest import Strategy

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES: tuple[Strategy, ...] = ("masked", "augmented", "chunked")
SHAPES = [
    LayerShape(tokens, 4096, size_out, slots, 16, 2)
    for tokens, size_out, slots in product((8, 512, 8192), (1024, 4096), (2, 8, 128))
]


CELLS = list(product(STRATEGIES, SHAPES))


def test_the_work_of_one_layer() -> None:
    """10 tokens, 4 features to 6, 2 slots of 3 rows, 2 bytes: every term written out."""
    shape = LayerShape(10, 4, 6, 2, 3, 2)
    select = 10 * 4 + 3.5 * 10 * 6 + 6 * 4 + 6 * 6
    flops = 2 * 10 * 6 * (4 + 6) / 1e9
    assert work("masked", shape) == (4, (select + 10 * 6 + 4 * 10 * 6) * 2 / 1e9, flops)
    assert work("augmented", shape) == (3, (select + 2 * 10 * 10 + 10 * 6) * 2 / 1e9, flops)
    with_bias = work("augmented", LayerShape(10, 4, 6, 2, 3, 2, has_bias=True))
    assert with_bias[0] == 2
    assert with_bias[1] == pytest.approx(work("augmented", shape)[1] - 2 * 10 * 6 * 2 / 1e9)
    places, chunks = 128, 2
    moved = places * (12 + 6 + 6) + 7 * 10 * 6 + 3 * chunks * 3 * 10
    assert work("chunked", shape) == (9, moved * 2 / 1e9, 2 * places * 3 * 10 / 1e9)
    with pytest.raises(ValueError, match="segmented"):
        work("segmented", shape)


def test_the_work_of_one_layer_with_kernels() -> None:
    """Of 2 slots both may be in use by 10 tokens, and one by a single token."""
    shape = LayerShape(10, 4, 6, 2, 3, 2)
    values = 10 * 4 + 2 * 10 * 6 + 2 * 3 * (4 + 6)
    sums, flops = 2 * 4 * 10 * 3, 2 * 10 * 3 * (4 + 6) / 1e9
    for strategy in WITH_KERNELS:
        assert work(strategy, shape, with_kernels=True) == (2, (values * 2 + sums) / 1e9, flops)
    with_bias = LayerShape(10, 4, 6, 2, 3, 2, has_bias=True)
    assert work("masked", with_bias, with_kernels=True) == work("masked", shape, with_kernels=True)
    moved = (values - 2 * 10 * 6) * 2 + sums
    assert work("augmented", with_bias, with_kernels=True) == (1, moved / 1e9, flops)
    one_token = (4 + 2 * 6 + 3 * (4 + 6)) * 2 + 2 * 4 * 3
    assert work("masked", LayerShape(1, 4, 6, 2, 3, 2), with_kernels=True)[1] == one_token / 1e9
    with pytest.raises(ValueError, match="no kernels of 'chunked'"):
        work("chunked", shape, with_kernels=True)


def test_a_fit_finds_the_costs_that_made_the_measurements() -> None:
    made = Costs(device="one", launch=2.5, gbyte=300.0, gflop=4.0)
    measured = [Measured(one, shape, added(made, one, shape), 50.0) for one, shape in CELLS]
    assert fit("one", measured) == made


def test_a_fit_finds_the_terms_of_the_kernels_too() -> None:
    terms = CostTerms(launch=1.25, gbyte=400.0, gflop=2.0)
    made = Costs(device="one", launch=2.5, gbyte=300.0, gflop=4.0, kernels=terms)
    measured = [Measured(one, shape, added(made, one, shape), 50.0) for one, shape in CELLS]
    measured += [
        Measured(one, shape, added(made, one, shape, with_kernels=True), 50.0, with_kernels=True)
        for one, shape in product(WITH_KERNELS, SHAPES)
    ]
    assert fit("one", measured) == made
    with pytest.raises(UsageError, match=r"2 measured layers with kernels are .*/kernels\.yaml"):
        fit("one", measured[: len(CELLS) + 2])


def test_a_fit_is_never_below_zero() -> None:
    """Flops that seem to save time are noise: they cost nothing then."""
    made = Costs(device="one", launch=2.5, gbyte=300.0, gflop=-0.05)
    measured = [Measured(one, shape, added(made, one, shape), 50.0) for one, shape in CELLS]
    found = fit("one", measured)
    assert found.gflop == 0
    assert found.launch > 0 < found.gbyte


def test_too_few_measurements() -> None:
    with pytest.raises(UsageError, match="1 measured layers are too few to calibrate; run workl"):
        fit("one", [Measured("masked", SHAPES[0], 3.0, 50.0)])


def test_the_costs_that_come_along_choose_as_the_measurements_do() -> None:
    """On every captured layer of docs/bench: within 10 % of the best that was measured."""
    costs, results = read_costs(), read_results(ROOT / "docs/bench/bench.json")
    layers = [cell for cell in results.cells if cell.kind == "layers"]
    assert len(layers) >= 6
    for cell in layers:
        shape = LayerShape(cell.tokens, 4096, 4096, cell.adapters, cell.rank, 2, has_bias=True)
        found = {one: cell.seconds(f"{one} captured") for one in STRATEGIES}
        measured = {one: seconds for one, seconds in found.items() if seconds is not None}
        chosen = min(measured, key=lambda one: added(costs, one, shape))
        assert measured[chosen] <= 1.1 * min(measured.values()), cell


def test_the_loop_has_no_model() -> None:
    with pytest.raises(ValueError, match="no cost of 'segmented'"):
        work("segmented", SHAPES[0])


def test_costs_of_before_the_kernels_and_of_after(tmp_path: Path) -> None:
    """The kernels' terms may be left out, and else are as strict as the others."""
    path = tmp_path / "costs.json"
    path.write_text('{"device": "one", "launch": 1.0, "gbyte": 2.0, "gflop": 3.0}')
    costs = read_costs(path)
    assert costs.kernels is None
    terms = '"kernels": {"launch": 1.0, "gbyte": 2.0'
    path.write_text(f'{{"device": "one", "launch": 1.0, "gbyte": 2.0, "gflop": 3.0, {terms}}}}}')
    with pytest.raises(UsageError, match="no costs of 'loraexport bench --calibrate': Field req"):
        read_costs(path)


def test_a_file_of_costs_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file .*; give a calibration's costs\.json"):
        read_costs(tmp_path / "costs.json")
