"""How cells, contestants and times are called, in tables and in plots."""

from collections.abc import Sequence

from ..contest import KERNELS
from ..results import Cell, Figure

WHO = {
    "base": "the base alone, ONNX",
    "base captured": "the same as a CUDA graph",
    "base torch": "the base alone in eager torch; models with SDPA",
    "base torch.compile": "the same by torch.compile (mode reduce-overhead)",
    "base GenAI": "the base alone in onnxruntime-genai",
    "segmented torch": "the seed's loop over segments, eager torch",
    "masked torch": "the masked strategy, eager torch",
    "masked torch.compile": "the same by torch.compile (mode reduce-overhead)",
    "PEFT": "PEFT's mixed batch, `adapter_names`",
    "one at a time": "onnxruntime with one adapter in the graph, run once for each adapter of the"
    " batch over its own rows; rows sorted and adapters on the device beforehand. Generation: a"
    " batch for each adapter on the mixed graph",
    "masked": "this project's graph, by that strategy",
    "augmented": "this project's graph, by that strategy",
    "chunked": "this project's graph, by that strategy",
    "segmented": "this project's graph, by that strategy",
    "mixed": "this project's graph of the whole model, plain onnxruntime",
    "mixed packed": "the same without the texts' padding (export.packed)",
    "mixed apart": "the same with a product of its own for each site (of q, k and v)",
    "mixed features": "the same with places for DoRA and biases at every site",
    "mixed blend": "the same with weights of slots (export.blend)",
    "base runtime": "the base's graph in the runtime's own engine, steps as CUDA graphs",
    "mixed runtime": "this project's graph in the runtime's own engine, steps as CUDA graphs",
    "mixed GenAI": "this project's graph in onnxruntime-genai",
    "engine": "this project's graph in the runtime's engine, whose requests join and leave",
    "engine static": "the same engine with as many requests as it has rows, in order of arrival,"
    " and the next ones when the longest has ended",
    "GenAI static": "this project's graph in onnxruntime-genai, the same batches, padded",
}
ENGINES = ("engine", "engine static", "GenAI static")
"""Contestants of kind engine."""
PEERS = (
    *("segmented torch", "masked torch", "masked torch.compile", "PEFT", "one at a time"),
    "mixed GenAI",
)
"""What ours is compared with beside the base."""

_SCALES = {"layer": (1e6, "µs"), "batch": (1e3, "ms"), "step": (1e3, "ms")}


def who(name: str) -> str:
    """What a contestant is."""
    if KERNELS in name:
        return f"{who(name.replace(KERNELS, ''))}, its functions computed by loraexport-kernels"
    return WHO.get(name) or f"{WHO[name.removesuffix(' captured')]}, as a CUDA graph"


def scale(unit: str) -> tuple[float, str]:
    """(factor of seconds, name) of a cell's times."""
    return _SCALES[unit]


def number(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def figure_value(figure: Figure) -> str:
    """Counts whole, all else with three digits."""
    if figure.unit == "count" or figure.value >= 1000:
        value = f"{figure.value:,.0f}"
    else:
        value = number(figure.value)
    return value if figure.unit in ("count", "ratio") else f"{value} {figure.unit}"


def axes(cell: Cell) -> dict[str, str]:
    """What tells a cell from the others of its workload: axis -> value, in words."""
    per_row = cell.tokens // cell.rows
    every = {
        "adapters": f"{cell.adapters} adapter{'' if cell.adapters == 1 else 's'}",
        "rank": cell.rank_label,
        "tokens": f"{cell.tokens} tokens",
    }
    if cell.kind == "model":
        every["tokens"] = f"{cell.rows} x {per_row}"
    if cell.kind == "generation":
        every["tokens"] = f"{cell.rows} row{'' if cell.rows == 1 else 's'}"
        every["phase"] = cell.phase
    return every


def cell_label(cell: Cell, cells: Sequence[Cell]) -> str:
    """The axes along which the workload's cells differ; its tokens if they are all alike."""
    every = [axes(sibling) for sibling in cells]
    cell_axes = axes(cell)
    varied = [name for name in cell_axes if len({values[name] for values in every}) > 1]
    return ", ".join(cell_axes[name] for name in varied or ["tokens"])
