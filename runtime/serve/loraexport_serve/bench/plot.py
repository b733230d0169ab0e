"""A run -> an SVG of two panels: latencies by model, and answers by the second."""

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

from .drive import Pace, Run
from .load import Load

_COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_MOST_LINES = len(_COLOURS)
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 380, 260, 60, 40, 90
_POINTS = 200
"""Of a line of latencies."""

Point = tuple[float, float]


def draw(run: Run, load: Load, pace: Pace) -> str:
    """The SVG's text. Of more models than colours the first ones have a line."""
    panels = [_latencies(run, load), _answers(run, pace)]
    width = _LEFT + 2 * _WIDTH + _GAP + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + 90}"'
            ' font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{_HEIGHT + 90}" fill="white"/>',
            *(
                f'<g transform="translate({_LEFT + place * (_WIDTH + _GAP)},{_TOP})">{panel}</g>'
                for place, panel in enumerate(panels)
            ),
            "</svg>\n",
        ]
    )


def _latencies(run: Run, load: Load) -> str:
    """The share of requests that were answered within so many ms, a line for each model."""
    lines: dict[str, list[Point]] = {}
    for place, name in enumerate(load.models[:_MOST_LINES]):
        ordered = sorted(
            1000 * (one.end - one.start)
            for one in run.samples
            if one.model == place and one.status == 200 and one.start >= 0
        )
        if ordered:
            count = len(ordered)
            picked = sorted({round(at * (count - 1) / _POINTS) for at in range(_POINTS + 1)})
            lines[name] = [(math.log10(max(ordered[at], 0.01)), (at + 1) / count) for at in picked]
    ends = [x for line in lines.values() for x, _ in line] or [0, 1]
    low, high = math.floor(min(ends)), math.ceil(max(ends) + 1e-9)
    ticks = [(float(at), f"{10.0**at:g}") for at in range(low, high + 1)]
    shares = [(at / 4, f"{at / 4:.0%}") for at in range(5)]
    return _panel("answered within ms", lines, ticks, shares)


def _answers(run: Run, pace: Pace) -> str:
    """How many answers came in each second, a line for each status."""
    counts = Counter((one.status, int(one.end)) for one in run.samples if one.end < pace.seconds)
    seconds = range(max(1, int(pace.seconds)))
    lines = {
        str(status) if status else "no answer": [
            (at + 0.5, float(counts[status, at])) for at in seconds
        ]
        for status in sorted({status for status, _ in counts})
    }
    most = max(counts.values(), default=1)
    step = 10 ** math.floor(math.log10(most))
    heights = [(float(at), f"{at:g}") for at in range(0, most + step, step)]
    ticks = [(at * len(seconds) / 4, f"{at * len(seconds) / 4:g}") for at in range(5)]
    return _panel("answers in each second", lines, ticks, heights)


def _panel(
    title: str,
    lines: dict[str, list[Point]],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> str:
    left, right = x_ticks[0][0], x_ticks[-1][0]
    top = y_ticks[-1][0]

    def at(point: Point) -> str:
        x = (point[0] - left) / (right - left) * _WIDTH
        return f"{x:.1f},{_HEIGHT * (1 - point[1] / top):.1f}"

    parts = [f'<text x="0" y="-14" font-size="13">{title}</text>']
    for x, label in x_ticks:
        place = at((x, 0)).split(",")[0]
        parts.append(f'<path d="M{place} 0V{_HEIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{place}" y="{_HEIGHT + 16}" text-anchor="middle">{label}</text>')
    for y, label in y_ticks:
        place = at((left, y)).split(",")[1]
        parts.append(f'<path d="M0 {place}H{_WIDTH}" stroke="#dddddd"/>')
        parts.append(f'<text x="-6" y="{place}" dy="4" text-anchor="end">{label}</text>')
    for place_of, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[place_of % len(_COLOURS)]
        points = " ".join(map(at, line))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(
            f'<text x="8" y="{14 + 14 * place_of}" fill="{colour}">{escape(name[:40])}</text>'
        )
    return "".join(parts)
