"""python -m fuzzing.worker TARGET FOLDER: a seed a line on stdin, an outcome a line on stdout."""

import json
import os
import random
import resource
import sys
import traceback
from pathlib import Path

from loraexport_runtime.errors import LoraexportError

from .target import ChangedNumbersError, Target, UnavailableError, load_target

_SPARE = 3 << 30
"""Bytes of address space that one case may take beside what the worker holds."""


def main() -> None:
    # What the product prints is not an outcome, and what it reads is not a seed.
    seeds, outcomes = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    home = Path(sys.argv[2])
    home.mkdir(parents=True, exist_ok=True)
    canary = home.parent / f"{home.name}-canary"
    os.environ["CANARY"] = str(canary)
    try:
        target = load_target(sys.argv[1])(home)
    except UnavailableError as error:
        print(json.dumps({"outcome": "unavailable", "said": str(error)}), file=outcomes)
        return
    _warm_up(target)
    limit = _address_space() + _SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({"outcome": "ready"}), file=outcomes)
    for line in seeds:
        outcome, detail = _try(target, random.Random(int(line)))
        if canary.exists():
            outcome, detail = "code", "code of the input ran"
            canary.unlink()
        text = json.dumps({"outcome": outcome, "said": target.said[:300], "detail": detail[-3000:]})
        print(text, file=outcomes)


def _try(target: Target, draw: random.Random) -> tuple[str, str]:
    try:
        target.attack(draw)
    except LoraexportError as error:
        if isinstance(error.__cause__, MemoryError):
            return "refused", "for want of memory"
        return "refused", str(error)
    except ChangedNumbersError:
        return "changed", traceback.format_exc()
    except MemoryError:
        return "memory", traceback.format_exc()
    except Exception:
        return "untyped", traceback.format_exc()
    return "accepted", ""


def _warm_up(target: Target) -> None:
    """Import what a case imports."""
    for seed in range(target.warm_ups):
        _try(target, random.Random(seed))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
