"""Samples -> what is printed, and the same as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .drive import Pace, Run, Sample
from .load import Load

QUANTILES = (50, 95, 99)


def summarize(run: Run, load: Load, pace: Pace, url: str) -> dict[str, Any]:
    """The figures of a run, as plain values.

    Throughput counts the answers that came within the counted seconds; latencies and statuses are
    of all requests that were to be sent within them.
    """
    sent = [sample for sample in run.samples if sample.start >= 0]
    by_model = {
        name: _figures([one for one in sent if one.model == place], run, load, pace, place)
        for place, name in enumerate(load.models)
    }
    return {
        "url": url,
        "route": load.route,
        "clients": pace.clients,
        "rate": pace.rate,
        "seconds": pace.seconds,
        "inputs": load.inputs,
        "zipf": load.zipf,
        "seed": load.seed,
        "client_cpu_seconds": round(run.cpu, 3),
        **_figures(sent, run, load, pace, None),
        "models": by_model,
    }


def _figures(
    sent: Sequence[Sample], run: Run, load: Load, pace: Pace, model: int | None
) -> dict[str, Any]:
    done = [
        sample
        for sample in run.samples
        if sample.status == 200
        and sample.end <= pace.seconds
        and (model is None or sample.model == model)
    ]
    answered = [sample for sample in sent if sample.status == 200]
    figures: dict[str, Any] = {
        "requests": len(sent),
        "statuses": {
            str(status): count for status, count in sorted(Counter(s.status for s in sent).items())
        },
        "requests_per_second": round(len(done) / pace.seconds, 2),
        "texts_per_second": round(len(done) * load.inputs / pace.seconds, 2),
        "tokens_in_per_second": round(sum(s.tokens_in for s in done) / pace.seconds, 1),
        "tokens_out_per_second": round(sum(s.tokens_out for s in done) / pace.seconds, 1),
        "latency_ms": quantiles([sample.end - sample.start for sample in answered]),
    }
    if load.route == "completions":
        firsts = [one.first - one.start for one in answered if one.first is not None]
        figures["first_event_ms"] = quantiles(firsts)
    return figures


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the worst, in ms: each the least value that so many are not above."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    found = {f"p{q}": ordered[max(0, -(-q * len(ordered) // 100) - 1)] for q in QUANTILES}
    return {name: round(1000 * value, 2) for name, value in (found | {"max": ordered[-1]}).items()}


def text(figures: dict[str, Any]) -> str:
    """A screen of it."""
    pace = (
        f"{figures['clients']} clients"
        if figures["rate"] is None
        else f"{figures['rate']:g} requests/s"
    )
    is_text = figures["route"] == "embeddings"
    heads = ("", "requests", "texts/s" if is_text else "tokens/s", "p50", "p95", "p99", "max")
    lines = [heads, _row("all", figures, is_text)]
    lines += [_row(name, one, is_text) for name, one in figures["models"].items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    table = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    statuses = ", ".join(
        f"{count} {'without an answer' if status == '0' else 'of ' + status}"
        for status, count in figures["statuses"].items()
    )
    return "\n".join(
        [
            f"{figures['url']}/v1/{figures['route']}: {pace}, {figures['seconds']:g} s;"
            " latencies in ms",
            *table,
            f"answers: {statuses or 'none'}",
            f"CPU of this generator: {figures['client_cpu_seconds']:.2f} s",
        ]
    )


def _row(name: str, figures: dict[str, Any], is_text: bool) -> tuple[str, ...]:
    speed = figures["texts_per_second" if is_text else "tokens_out_per_second"]
    latency = figures["latency_ms"]
    cells = [f"{latency[q]:.1f}" if latency else "-" for q in ("p50", "p95", "p99", "max")]
    return (name, str(figures["requests"]), f"{speed:.1f}", *cells)
