"""Results -> bench.md: times and ratios of every workload."""

from collections.abc import Sequence

from ..contest import Group, base_of
from ..results import Cell, EngineCase, Entry, Results
from .words import ENGINES, PEERS, cell_label, figure_value, number, scale, who

_CUDA = (
    "Times are between two events on the device's stream; bench.json has the wall times too. The"
    " inputs rotate over several copies. A captured contestant has a CUDA graph for each copy, and"
    " onnxruntime waits for the device after each replay, of the base's too."
)


def to_markdown(results: Results) -> str:
    """The whole report."""
    bench = results.workloads
    each = f", each of about {bench.round_ms} ms; in brackets the quartiles"
    each = each if results.cells else ""
    lines = [
        f"# {bench.name}: {results.environment['device']}",
        "",
        f"{bench.dtype}; medians of {bench.rounds} rounds that alternate the contestants{each}.",
        "",
        ", ".join(f"{key} {value}" for key, value in results.environment.items()),
    ]
    if bench.device == "cuda" and results.cells:
        lines += ["", _CUDA]
    if results.disagreements:
        lines += ["", *(f"- not timed: {disagreement}" for disagreement in results.disagreements)]
    for name in dict.fromkeys(cell.workload for cell in results.cells):
        cells = [cell for cell in results.cells if cell.workload == name]
        lines += ["", f"## {name}", "", _describe(cells), "", *_ratios(cells)]
        for unit in dict.fromkeys(cell.unit for cell in cells):
            lines += ["", *_times([cell for cell in cells if cell.unit == unit])]
        lines += ["", *_over_fastest(cells)]
        lines += _left_out(cells)
    for case in results.engines:
        lines += ["", *_engine_case(case)]
    names = {entry.name for cell in results.cells for entry in cell.entries}
    ran = [name for name in _in_order(results.cells) if name in names]
    figures = {figure.name for case in results.engines for figure in case.figures}
    ran += [name for name in ENGINES if name in figures]
    lines += ["", "## Contestants", ""]
    lines += [f"- {name}: {who(name)}" for name in ran]
    return "\n".join(lines) + "\n"


def _describe(cells: Sequence[Cell]) -> str:
    first = cells[0]
    spans = []
    for axis, values in (
        ("adapters", {cell.adapters for cell in cells}),
        ("rank", {rank for cell in cells for rank in cell.ranks or [cell.rank]}),
    ):
        low, high = min(values), max(values)
        spans.append(f"{axis} {low}" + (f" to {high}" if high > low else ""))
    if first.ranks:
        spans.append("which differ within a batch")
    return f"kind {first.kind}; {', '.join(spans)}; every contestant gets the same inputs."


def _ratios(cells: Sequence[Cell]) -> list[str]:
    """A row for each cell: ours over the base alone, run the same way and in the fastest one, and
    each peer over ours."""
    peers = [name for name in PEERS if any(_ratio(cell, name, cell.ours) for cell in cells)]
    decodes = any(cell.phase == "decode" for cell in cells)
    has_floor = any(cell.floors["mixed"].seconds for cell in cells)
    columns = ["", "ours", "ours / base", "fastest base", "ours / fastest base"]
    columns += [*(f"{name} / ours" for name in peers), "base / base torch"]
    columns += ["ours, tokens/s"] if decodes else []
    columns += ["ours / floor", "base / floor"] if has_floor else []
    rows = []
    for cell in cells:
        base = base_of(cell.ours or "")
        row = [cell_label(cell, cells), cell.ours or "none ran", _ratio(cell, cell.ours, base)]
        fastest = cell.fastest_base
        row += [fastest or "none ran", _ratio(cell, cell.ours, fastest)]
        row += [_ratio(cell, name, cell.ours) for name in peers]
        row.append(_ratio(cell, base, "base torch"))
        seconds = cell.seconds(cell.ours)
        if decodes:
            speed = f"{cell.rows / seconds:.0f}" if seconds and cell.phase == "decode" else ""
            row.append(speed)
        if has_floor:
            row += [_over_floor(cell, cell.ours, "mixed"), _over_floor(cell, base, "base")]
        rows.append(row)
    return _table(columns, rows)


def _ratio(cell: Cell, name: str | None, over: str | None) -> str:
    """Empty where one of the two did not run, or both are one."""
    mine, reference = cell.seconds(name), cell.seconds(over)
    return number(mine / reference) if mine and reference and name != over else ""


def _over_floor(cell: Cell, name: str | None, group: Group) -> str:
    floor, seconds = cell.floors[group].seconds, cell.seconds(name)
    return number(seconds / floor) if floor and seconds else ""


def _times(cells: Sequence[Cell]) -> list[str]:
    """A row for each contestant, a column for each cell."""
    factor, unit = scale(cells[0].unit)
    columns = [f"{unit} per {cells[0].unit}", *(cell_label(cell, cells) for cell in cells)]
    by_cell = [{entry.name: entry for entry in cell.entries} for cell in cells]
    rows = []
    for name in _in_order(cells):
        times = [_time(entries.get(name), factor) for entries in by_cell]
        rows.append([name, *times])
    groups: tuple[Group, ...] = ("base", "mixed")
    for group in groups:
        floors = [cell.floors[group].seconds for cell in cells]
        if any(floors):
            shown = ["" if floor is None else number(floor * factor) for floor in floors]
            rows.append([f"floor, {group}", *shown])
    return _table(columns, rows)


def _over_fastest(cells: Sequence[Cell]) -> list[str]:
    """The same, each time over that of the cell's fastest base."""
    columns = ["over the fastest base", *(cell_label(cell, cells) for cell in cells)]
    rows = []
    for name in _in_order(cells):
        seconds = [(cell.seconds(name), cell.seconds(cell.fastest_base)) for cell in cells]
        rows.append(
            [name, *(number(mine / base) if mine and base else "" for mine, base in seconds)]
        )
    return _table(columns, rows)


def _time(entry: Entry | None, factor: float) -> str:
    if entry is None:
        return ""
    lower, median, upper = (
        number(value * factor)
        for value in (entry.timing.lower, entry.timing.median, entry.timing.upper)
    )
    return f"{median} ({lower}–{upper})"


def _in_order(cells: Sequence[Cell]) -> list[str]:
    """Every contestant once, the base's first."""
    entries = [entry for cell in cells for entry in cell.entries]
    ordered = sorted(entries, key=lambda entry: entry.group)  # sorts are stable
    return list(dict.fromkeys(entry.name for entry in ordered))


def _engine_case(case: EngineCase) -> list[str]:
    """A row for each figure."""
    rows = [[figure.name, figure_value(figure)] for figure in case.figures]
    adapters = f"{case.adapters} adapters of rank {case.rank}"
    return [
        f"## {case.workload}, {case.case}",
        "",
        f"kind engine; {adapters}, {case.rows} rows; a round is all requests.",
        "",
        *_table(["", "median"], rows),
        *_left_out([case]),
    ]


def _left_out(cells: Sequence[Cell | EngineCase]) -> list[str]:
    """Who did not run, and why, each once."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        for name, reason in cell.left_out.items():
            names = reasons.setdefault(reason, [])
            if name not in names:
                names.append(name)
    lines = [f"- not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return ["", *lines] if lines else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]
