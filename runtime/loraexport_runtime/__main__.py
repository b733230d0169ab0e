"""python -m loraexport_runtime check: an artifact's stored cases on this machine, without torch.

Exit codes: 0 every case passed; 2 usage, or a provider cannot run here; 3 a case failed; 5 the
artifact is damaged, or is not the pinned one; 4 an adapter in it cannot be used; 1 a fault of our
own; 130 Ctrl-C; 143 SIGTERM.
"""

import argparse
import sys
from collections.abc import Sequence

from .checking.check import CheckReport, check_artifact
from .checking.rows import Comparison, describe_failure, largest
from .errors import LoraexportError, exit_code

FAILED = 3
INTERRUPTED = 130
_COLUMNS = ("implementation", "layer", "worst site", "adapter", "case", "error", "gain", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives its exit code."""
    options = _parser().parse_args(arguments)
    providers = options.providers and [name.strip() for name in options.providers.split(",")]
    try:
        report = check_artifact(options.artifact, providers, options.digest)
    except LoraexportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("Stopped: by SIGINT", file=sys.stderr)
        return INTERRUPTED
    print(report.to_json().rstrip() if options.json else _table(report))
    for warning in _warnings(report):
        print(warning, file=sys.stderr)
    return 0 if report.status == "passed" else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m loraexport_runtime", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="run an artifact's stored cases on this machine, before it takes traffic",
        description="Run an artifact's stored cases on this machine, before it takes traffic.",
    )
    check.add_argument("artifact", metavar="ARTIFACT", help="the artifact's folder")
    check.add_argument(
        "--providers", help="cpu, cuda, or both with a comma; default: what runs it here"
    )
    check.add_argument("--digest", metavar="HEX", help="the sha256 of its manifest.json")
    check.add_argument("--json", action="store_true", help="print JSON for a program to read")
    return parser


def _table(report: CheckReport) -> str:
    """The worst row of each implementation and layer, and what the report says in all."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for row in report.rows:
        groups.setdefault((row.implementation, row.layer), []).append(row)
    table = [_COLUMNS]
    for rows in groups.values():
        worst = largest(rows)
        gain = "" if worst.gain is None else f"{worst.gain:.5f}"
        names = (worst.implementation, worst.layer, worst.site, worst.adapter, worst.worst_case)
        table.append((*names, f"{worst.error:.1e}", gain, "ok" if worst.passed else "FAILED"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]
    lines += [f"not run: {name}: {why}" for name, why in report.skipped.items()]
    lines.append(
        f"{report.status}: {report.artifact}: {len(report.rows) - len(report.failures)} of"
        f" {len(report.rows)} comparisons with the stored cases, tolerance {report.tolerance:.0e}"
    )
    return "\n".join([*lines, f"digest: {report.digest}"])


def _warnings(report: CheckReport) -> list[str]:
    """What to do, where a case failed here or the build was not proven."""
    where = report.artifact
    if report.failures:
        worst = largest(report.failures)
        failed = describe_failure(worst, report.tolerance, report.gain_tolerance)
        return [
            f"{len(report.failures)} of {len(report.rows)} comparisons failed. Worst: {failed}."
            f" Do not serve {where} from this machine; copy it again, try another provider, or"
            " another version of onnxruntime"
        ]
    if report.parity == "failed":
        return [f"{where}: its parity failed when it was built; do not serve it, build it again"]
    if report.parity == "deferred":
        return [
            f"{where}: its parity is deferred, so load() refuses it. Run 'loraexport verify"
            f" {where}' where its base is, or pass allow_unverified=True"
        ]
    return []


if __name__ == "__main__":
    sys.exit(main())
