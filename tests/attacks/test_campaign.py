"""A small part of scripts/fuzz, the same seeds each time; and that a campaign finds things."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fuzzing.broken import WAYS, way_of
from fuzzing.campaign import FINE, run_campaign
from fuzzing.target import TARGETS, UnavailableError

SCRIPT = Path(__file__).parents[2] / "scripts/fuzz"
COUNTS = {
    "specs": 60,
    "adapters": 60,
    "artifacts": 40,
    "bases": 40,
    "builds": 4,
    "texts": 40,
    "generators": 40,
    "kills": 2,
    "disks": 3,
}
SLOW = pytest.mark.slow
SLOW_ONES = {*COUNTS} - {"specs"}
ALWAYS_SOUND = ("kills", "disks")
"""They start from sound inputs: it is the machine that fails."""
PATIENCE_S = 120
"""No case takes so long on any machine: one that does has no end."""


def test_every_target_is_tried() -> None:
    assert COUNTS.keys() == TARGETS.keys()


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=SLOW if name in SLOW_ONES else ()) for name in COUNTS]
)
def test_nothing_hangs_crashes_or_is_believed(target: str) -> None:
    try:
        result = run_campaign(target, range(COUNTS[target]), PATIENCE_S)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert result.findings == []
    assert sum(result.counts.values()) == COUNTS[target]
    if target not in ALWAYS_SOUND:
        assert result.counts["refused"] > COUNTS[target] / 10, "the mutations reach nothing"


def test_a_campaign_finds_what_breaks() -> None:
    seeds = {way_of(seed): seed for seed in range(100)}
    assert seeds.keys() == set(WAYS)
    hang = seeds.pop("hang")
    result = run_campaign("fuzzing.broken:Broken", seeds.values(), PATIENCE_S)
    assert result.counts == Counter(seeds.keys())
    findings = {finding.outcome: finding for finding in result.findings}
    assert findings.keys() == seeds.keys() - set(FINE)
    assert findings["untyped"].seed == seeds["untyped"]
    assert findings["untyped"].said == "untyped"
    assert findings["untyped"].detail.endswith("ValueError: raw\n")
    (finding,) = run_campaign("fuzzing.broken:Broken", [hang], 0.1).findings
    assert (finding.seed, finding.outcome) == (hang, "hang")


def test_the_script_counts_outcomes() -> None:
    command = [sys.executable, SCRIPT, "--target", "specs", "--seed", "1000", "--count", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("specs: ")
    assert done.stdout.endswith(" s\n")
