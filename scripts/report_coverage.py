"""Print how much of each package the last run of the tests reached; exit 1 below 95 %.

Functions of tests/gpu/covered.json are left out: tests/gpu runs them, where there is a GPU; and so
are files that only the processes of other servers run.
"""

import json
import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.functions import function_lines  # noqa: E402

PACKAGES = ("loraexport", "runtime/loraexport_runtime", "runtime/serve/loraexport_serve")
LEAST = 95.0
FOREIGN = {
    "runtime/serve/loraexport_serve/ray.py": "Ray's replicas; tests/serve/test_ray.py",
    "runtime/serve/loraexport_serve/triton/model.py": "Triton, as a copy; tests/serve/test_triton*",
}
"""Who runs it, and which tests."""


def main(root: Path = ROOT) -> int:
    data = coverage.Coverage(data_file=root / ".coverage", config_file=False)
    data.load()
    on_gpu = json.loads((root / "tests/gpu/covered.json").read_text())
    enough = True
    for package in PACKAGES:
        total = missed = 0
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name in FOREIGN:
                continue
            _, statements, _, missing, _ = data.analysis2(str(path))
            ranges = function_lines(path) if name in on_gpu else {}
            elsewhere = {line for one in on_gpu.get(name, {}) for line in ranges[one]}
            lines = sorted(set(missing) - elsewhere)
            total += len(set(statements) - elsewhere)
            missed += len(lines)
            if lines:
                print(f"{name}: {', '.join(_spans(lines))}")
        share = 100 * (total - missed) / total
        enough = enough and share >= LEAST
        print(f"{Path(package).name}: {share:.1f} % of {total} lines (at least {LEAST:g} %)\n")
    return 0 if enough else 1


def _spans(lines: list[int]) -> list[str]:
    """Lines as spans: 3, 4, 5, 9 -> 3-5, 9."""
    spans: list[list[int]] = []
    for line in lines:
        if spans and line == spans[-1][1] + 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    return [f"{first}-{last}" if last > first else str(first) for first, last in spans]


if __name__ == "__main__":
    sys.exit(main())
