"""A parity report in a terminal's words, or as JSON."""

import json
from typing import Any

from rich.table import Table

from .console import out_console


def report_dict(report: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(report.to_json())
    return data


def print_report(report: Any) -> None:
    table = Table(title=f"parity {report.status}, against {report.reference}")
    for column in ("implementation", "layer", "worst site", "adapter", "error", "gain", ""):
        table.add_column(column)
    worst: dict[tuple[str, str], Any] = {}
    for row in report.rows:
        key = (row.implementation, row.layer)
        rank = (not row.passed, row.error)
        if key not in worst or rank > (not worst[key].passed, worst[key].error):
            worst[key] = row
    for row in worst.values():
        gain = "" if row.gain is None else f"{row.gain:.5f}"
        verdict = "ok" if row.passed else "FAILED"
        error = f"{row.error:.1e}"
        table.add_row(row.implementation, row.layer, row.site, row.adapter, error, gain, verdict)
    out_console.print(table)
    for name, why in report.skipped.items():
        out_console.print(f"not run: {name}: {why}")
