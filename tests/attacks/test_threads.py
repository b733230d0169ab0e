"""A small part of `scripts/fuzz --threads`; and that it finds wrong rows and waits without end."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing.threads import Result, run_threads, write_versions
from support.faults import forget_writes

from loraexport_runtime.slots.fair_queue import FairQueue

SCRIPT = Path(__file__).parents[2] / "scripts/fuzz"
PATIENCE_S = 120.0


@pytest.fixture
def stress(tenants: Path, tmp_path: Path) -> Callable[..., Result]:
    def run(rows: int, patience_s: float = PATIENCE_S) -> Result:
        versions = write_versions(tmp_path)
        return run_threads(tenants, versions, rows, rows // 2, patience_s=patience_s)

    return run


def test_no_row_is_wrong_beside_loads(stress: Callable[..., Result]) -> None:
    result = stress(3000)
    assert result.findings == []
    assert result.rows >= 3000
    assert result.wrong == 0
    assert result.loads > 10
    assert result.memory.keys() == {"start", "warm", "end"}


def test_rows_of_another_adapter_are_found(
    stress: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth write of a slot does not happen."""
    forget_writes(monkeypatch)
    result = stress(50_000)
    assert result.wrong > 0
    assert "rows of" in result.findings[0]
    assert result.rows < 50_000, "the first one ends it"


def test_threads_that_nobody_wakes_are_found(
    stress: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FairQueue, "notify", lambda self: None)
    result = stress(50_000, patience_s=0.5)
    assert any(
        "SlotTimeoutError" in finding or "is stuck" in finding for finding in result.findings
    )


def test_the_script_counts_rows() -> None:
    command = [sys.executable, SCRIPT, "--threads", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("threads: ")
    assert " 0 wrong, " in done.stdout
