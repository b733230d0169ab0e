"""The layers of a run -> the costs by which `auto` chooses a strategy."""

from pathlib import Path

import yaml

from loraexport_runtime.contract.manifest import Strategy

from ..artifact import write_whole
from ..errors import UsageError
from ..plan.costs import WITH_KERNELS, LayerShape, Measured, fit
from ..plan.stacks import BYTES_PER_VALUE
from ..spec.schema import Costs
from .contest import KERNELS
from .results import Results

COSTS_FILE = "costs.json"
_CONTESTANTS: list[tuple[Strategy, bool]] = [
    *(("masked", False), ("augmented", False), ("chunked", False)),
    *((strategy, True) for strategy in WITH_KERNELS),
]
"""A strategy, and whether kernels take its function."""


def calibrate(results: Results, out: Path) -> Costs:
    """Fit the costs to every captured layer of a run, and write `out`/costs.json.

    Cells whose adapters differ in rank are left out: what such a slot costs is not modelled.

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
        if base is None or cell.workload not in sizes or cell.ranks:
            continue
        for strategy, with_kernels in _CONTESTANTS:
            seconds = cell.seconds(f"{strategy}{KERNELS if with_kernels else ''} captured")
            if seconds is not None:
                slots = cell.used if with_kernels else cell.adapters
                layer = (cell.tokens, *sizes[cell.workload], slots)
                shape = LayerShape(*layer, cell.rank, size, has_bias=True)
                times = 1e6 * (seconds - base), 1e6 * base
                measured.append(Measured(strategy, shape, *times, with_kernels))
    if not measured:
        raise UsageError("no layer of this run was captured, so there is nothing to calibrate with")
    device = results.environment.get("device", "this device")
    costs = fit(device, measured)
    write_whole(
        out / COSTS_FILE, f"{costs.model_dump_json(indent=1, exclude_none=True)}\n".encode()
    )
    return costs


def as_spec(costs: Costs) -> str:
    """The lines of a spec that make `auto` follow these costs."""
    data = {"export": {"tune": {"device": "cuda", "costs": costs.model_dump(exclude_none=True)}}}
    return yaml.safe_dump(data, sort_keys=False)
