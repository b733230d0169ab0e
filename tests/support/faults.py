"""Faults put into the runtime, which a campaign has to find."""

from collections.abc import Mapping

import numpy as np
import pytest

from loraexport_runtime.slots.host import AdapterHost


def forget_writes(monkeypatch: pytest.MonkeyPatch, whole: int = 0) -> None:
    """Every fourth write of a slot does not happen, but for so many first ones."""
    write, count = AdapterHost._write_slot, 0

    def forget(host: AdapterHost, slot: int, blocks: Mapping[str, np.ndarray]) -> None:
        nonlocal count
        count += 1
        if count <= whole or count % 4:
            write(host, slot, blocks)

    monkeypatch.setattr(AdapterHost, "_write_slot", forget)
