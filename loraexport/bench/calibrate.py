"""The layers of a run -> the costs by which `auto` chooses a strategy."""

from pathlib import Path

import yaml

from loraexport_runtime.contract.manifest import Strategy

from ..artifact import write_whole
from ..errors import UsageError
from ..plan.costs import LayerShape, Measured, fit
from ..plan.stacks import BYTES_PER_VALUE
from ..spec.schema import Costs
from .results import Results

COSTS_FILE = "costs.json"
_STRATEGIES: tuple[Strategy, ...] = ("masked", "augmented", "chunked")


def calibrate(results: Results, out: Path) -> Costs:
    """Fit the costs to every captured layer of a run, and write `out`/costs.json.

    Raises:
        UsageError: the run has too few of them.
    """
    size = BYTES_PER_VALUE[results.workloads.dtype]
    sizes = {
        workload.name: (workload.in_features, workload.out_features)
        for workload in results.workloads.workloads
        if workload.kind == "layers"
    }
    measured: list[Measured] = []
    for cell in results.cells:
        base = cell.seconds("base captured")
        for strategy in _STRATEGIES:
            seconds = cell.seconds(f"{strategy} captured")
            if base is not None and seconds is not None and cell.workload in sizes:
                layer = sizes[cell.workload]
                shape = LayerShape(
                    cell.tokens, *layer, cell.adapters, cell.rank, size, has_bias=True
                )
                measured.append(Measured(strategy, shape, 1e6 * (seconds - base), 1e6 * base))
    if not measured:
        raise UsageError("no layer of this run was captured, so there is nothing to calibrate with")
    device = results.environment.get("device", "this device")
    costs = fit(device, measured)
    write_whole(out / COSTS_FILE, f"{costs.model_dump_json(indent=1)}\n".encode())
    return costs


def as_spec(costs: Costs) -> str:
    """The lines of a spec that make `auto` follow these costs."""
    data = {"export": {"tune": {"device": "cuda", "costs": costs.model_dump()}}}
    return yaml.safe_dump(data, sort_keys=False)
