"""Results -> PNG files: cost along every axis, overhead over the base alone, and the peers."""

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ...artifact import write_whole
from ...errors import UsageError
from ..contest import base_of
from ..results import Cell, Results
from .words import PEERS, axes, cell_label, scale

_COLOURS = {
    "base": "#7f7f7f",
    "masked": "#1f77b4",
    "mixed": "#1f77b4",
    "masked kernels": "#08306b",
    "augmented kernels": "#00441b",
    "mixed kernels": "#08306b",
    "mixed packed": "#17becf",
    "mixed apart": "#2ca02c",
    "mixed features": "#9467bd",
    "mixed blend": "#8c564b",
    "augmented": "#2ca02c",
    "chunked": "#9467bd",
    "segmented": "#8c564b",
    "PEFT": "#d62728",
    "one at a time": "#e377c2",
}
_TORCH = {
    "base torch": "#b0b0b0",
    "base torch.compile": "#636363",
    "segmented torch": "#ff7f0e",
    "masked torch": "#bcbd22",
    "masked torch.compile": "#8c6d31",
}
_KINDS = {"layers": "#1f77b4", "model": "#2ca02c", "generation": "#9467bd"}
_AXES = {"adapters": "adapters", "rank": "rank", "tokens": "tokens of the batch"}
_LEGEND = {"fontsize": 8, "handlelength": 3.5, "frameon": False}
_GRID = {"color": "#dddddd", "linewidth": 0.7}


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Write every plot that the results have points for; give their paths.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "plots need matplotlib; install 'loraexport[bench]', then 'loraexport bench --from"
            f" {folder / 'bench.json'} --out {folder}'"
        ) from error

    def make(**options: Any) -> Any:
        figure = Figure(layout="constrained", dpi=150, **options)
        FigureCanvasAgg(figure)
        return figure

    title = f"{results.environment['device']}, {results.workloads.dtype}"
    figures: dict[str, Any] = {}
    for name in dict.fromkeys(cell.workload for cell in results.cells):
        cells = [cell for cell in results.cells if cell.workload == name]
        for axis in _AXES:
            if len({_position(cell, axis) for cell in cells}) > 1:
                figures[f"{name}-{axis}"] = _plot_axis(make, cells, axis, title)
    if any(cell.ours for cell in results.cells):
        figures["overhead"] = _plot_overhead(make, results.cells, title)
        figures["peers"] = _plot_peers(make, results.cells, title)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.png")
        image = BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
        write_whole(paths[-1], image.getvalue())
    return paths


def _position(cell: Cell, axis: str) -> int:
    values = {"adapters": cell.adapters, "rank": cell.rank}
    return values.get(axis, cell.rows if cell.kind == "generation" else cell.tokens)


def _plot_axis(make: Any, cells: Sequence[Cell], axis: str, title: str) -> Any:
    """Time against one axis, a panel for each combination of the other axes."""
    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        fixed = {key: value for key, value in axes(cell).items() if key != axis}
        panels.setdefault(", ".join(fixed.values()), []).append(cell)
    panels = {key: panel for key, panel in panels.items() if len(panel) > 1}
    figure = make(figsize=(1.8 + 4.6 * len(panels), 4.8))
    plots = figure.subplots(1, len(panels), squeeze=False)[0]
    names: dict[str, Any] = {}
    for plot, (label, panel) in zip(plots, panels.items(), strict=True):
        panel.sort(key=lambda cell: _position(cell, axis))
        names |= _draw_lines(plot, panel, axis)
        plot.set_title(label, fontsize=9)
    order = sorted(names, key=lambda name: (not name.startswith("base"), name == "floor"))
    figure.legend([names[name] for name in order], order, loc="outside right center", **_LEGEND)
    figure.suptitle(f"{cells[0].workload}: {title}", fontsize=11)
    return figure


def _draw_lines(plot: Any, cells: Sequence[Cell], axis: str) -> dict[str, Any]:
    """A line for each contestant with its quartiles, and the floor; the lines by name.

    Of a graph that ran captured and not only the former is drawn.
    """
    factor, unit = scale(cells[0].unit)
    points: dict[str, list[tuple[int, Any]]] = {}
    for cell in cells:
        names = {entry.name for entry in cell.entries}
        for entry in cell.entries:
            if f"{entry.name} captured" in names:
                continue  # two lines of one graph would hide the others
            points.setdefault(entry.name, []).append((_position(cell, axis), entry.timing))
    drawn = {}
    for name, line in points.items():
        x = [at for at, _ in line]
        (drawn[name],) = plot.plot(
            x, [timing.median * factor for _, timing in line], **_style(name)
        )
        low, high = (
            [getattr(timing, q) * factor for _, timing in line] for q in ("lower", "upper")
        )
        plot.fill_between(x, low, high, color=_style(name)["color"], alpha=0.15, linewidth=0)
    floors = [(_position(cell, axis), cell.floors["mixed"].seconds) for cell in cells]
    floor_line = [(at, seconds * factor) for at, seconds in floors if seconds]
    if floor_line:
        look = {"color": "black", "linestyle": (0, (1, 1)), "linewidth": 1}
        (drawn["floor"],) = plot.plot(*zip(*floor_line, strict=True), **look)
    plot.set_xscale("log", base=2)
    plot.set_yscale("log")
    ticks = sorted({_position(cell, axis) for cell in cells})
    plot.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    plot.minorticks_off()
    _round_ticks(plot.yaxis)
    plot.tick_params(axis="y", labelsize=8)
    rows = axis == "tokens" and cells[0].kind == "generation"
    plot.set_xlabel("rows of the batch" if rows else _AXES[axis])
    plot.set_ylabel(f"{unit} per {cells[0].unit}")
    _clean(plot, "both")
    return drawn


def _round_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5 of every decade, more of them where there is but one."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _style(name: str) -> dict[str, Any]:
    """Colour by the way of computing; solid as a CUDA graph, dashed without, dotted in torch."""
    stem = re.sub(r" (captured|runtime|GenAI)$", "", name)
    colour = _TORCH.get(name) or _COLOURS[stem]
    captured = name.endswith(("captured", "runtime"))
    line = "-" if captured else ":" if name in _TORCH or name == "PEFT" else "--"
    marker = {"GenAI": "s", "runtime": "D"}.get(name.split(" ")[-1], "o")
    fill = colour if captured else "white"
    return {
        "color": colour,
        "linestyle": line,
        "linewidth": 2 if captured else 1.4,
        "marker": marker,
        "markersize": 4.5,
        "markerfacecolor": fill,
    }


def _plot_overhead(make: Any, cells: Sequence[Cell], title: str) -> Any:
    """Ours over the base alone, a line from 1 for each cell; hollow over the fastest one."""
    rows = []
    for cell in cells:
        ours, base = cell.seconds(cell.ours), cell.seconds(base_of(cell.ours or ""))
        if ours and base:
            fastest = ours / _seconds(cell, cell.fastest_base)
            rows.append((_row_label(cell, cells), ours / base, fastest, cell))
    figure = make(figsize=(8.5, 1.6 + 0.3 * len(rows)))
    plot = figure.subplots()
    for at, (_, ratio, fastest, cell) in enumerate(rows):
        colour = _KINDS[cell.kind]
        plot.plot([1, ratio], [at, at], color=colour, linewidth=3, solid_capstyle="butt")
        plot.plot([ratio], [at], marker="o", color=colour)
        plot.plot([fastest], [at], marker="o", color=colour, markerfacecolor="white")
        plot.annotate(
            f"{ratio:.2f}, {fastest:.2f}  {cell.ours}",
            (max(ratio, fastest, 1), at),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    plot.axvline(1, color="black", linewidth=1)
    ratios = [1.0, *(value for _, *both, _ in rows for value in both)]
    room = max(ratios) - min(ratios) + 0.1
    plot.set_xlim(min(ratios) - 0.05 * room, max(ratios) + 0.4 * room)  # the names stand there
    _label_rows(plot, [label for label, *_ in rows])
    plot.set_xlabel("time over the base alone, run the same way; hollow: run in the fastest way")
    figure.suptitle(f"overhead of a mixed batch: {title}", fontsize=11)
    return figure


def _plot_peers(make: Any, cells: Sequence[Cell], title: str) -> Any:
    """Each peer over ours, a row for each cell."""
    shown = [cell for cell in cells if cell.ours]
    figure = make(figsize=(8.5, 2.0 + 0.3 * len(shown)))
    plot = figure.subplots()
    drawn = {}
    for name in PEERS:
        ratios = [
            (_seconds(cell, name) / _seconds(cell, cell.ours), at)
            for at, cell in enumerate(shown)
            if cell.seconds(name) and name != cell.ours
        ]
        if ratios:
            style = _style(name)
            plot.plot(
                [ratio for ratio, _ in ratios],
                [at for _, at in ratios],
                linestyle="",
                marker=style["marker"],
                color=style["color"],
                markersize=6,
            )
            drawn[name] = plot.lines[-1]
    plot.axvline(1, color="black", linewidth=1)
    plot.set_xscale("log")
    _round_ticks(plot.xaxis)
    _label_rows(plot, [_row_label(cell, cells) for cell in shown])
    plot.set_xlabel("times as long as ours")
    figure.legend(list(drawn.values()), list(drawn), loc="outside right center", **_LEGEND)
    figure.suptitle(f"peers on the same batch: {title}", fontsize=11)
    return figure


def _seconds(cell: Cell, name: str | None) -> float:
    seconds = cell.seconds(name)
    assert seconds is not None, "only contestants that ran are drawn"
    return seconds


def _row_label(cell: Cell, cells: Sequence[Cell]) -> str:
    siblings = [sibling for sibling in cells if sibling.workload == cell.workload]
    return f"{cell.workload}: {cell_label(cell, siblings)}"


def _label_rows(plot: Any, labels: Sequence[str]) -> None:
    plot.set_yticks(range(len(labels)), labels, fontsize=8)
    plot.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    _clean(plot, "x")


def _clean(plot: Any, grid: str) -> None:
    plot.minorticks_off()
    plot.grid(visible=True, axis=grid, **_GRID)
    plot.set_axisbelow(True)
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
