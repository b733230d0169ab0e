"""A whole model's graph in plain onnxruntime, as a program in C or C++ would run it.

    python examples/plain_onnxruntime.py artifacts/minilm

Needs numpy and onnxruntime; nothing of loraexport. The graph does not check slot numbers, so that a
caller has to: `slot_numbers` does. The stacks of A and B are overridable initializers: they hold
the adapters of the build, and may be fed like any input.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

TOKENS = [101, 7592, 2088, 999, 102]


def slot_numbers(names: Sequence[str | None], manifest: Mapping[str, Any]) -> np.ndarray:
    """adapter_ids int64 [rows]: the slot of each name, 0 for None. KeyError for any other."""
    slots = {entry["name"]: entry["slot"] for entry in manifest["adapters"]}
    numbers = np.array([0 if name is None else slots[name] for name in names], dtype=np.int64)
    check_slots(numbers, manifest["num_slots"])
    return numbers


def check_slots(numbers: np.ndarray, num_slots: int) -> None:
    """Raise ValueError unless all are from 0 to num_slots: the graph would take any number."""
    if numbers.min() < 0 or numbers.max() > num_slots:
        raise ValueError(f"slots {numbers.tolist()}; expected 0 to {num_slots}")


def main(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that the stacks may be overridden, as they should
    graph = artifact / "graphs/model.onnx"
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0].name

    entries = manifest["adapters"]
    names = [*(entry["name"] for entry in entries if entry["slot"] is not None), None]
    ids = np.tile(np.array(TOKENS, dtype=np.int64), (len(names), 1))
    values = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    feeds = {
        value.name: values[value.name] for value in session.get_inputs() if value.name in values
    }
    base = session.run(
        [output], {**feeds, "adapter_ids": slot_numbers([None] * len(names), manifest)}
    )[0]
    feeds["adapter_ids"] = slot_numbers(names, manifest)
    mixed = session.run([output], feeds)[0]
    print(f"{artifact}: {output} {list(mixed.shape)}, one batch of {len(names)} rows")
    for row, name in enumerate(names):
        share = np.linalg.norm(mixed[row] - base[row]) / np.linalg.norm(base[row])
        print(f"  {name or 'base':10} row {row} moved: {100 * share:6.2f} %")

    stacks = [value for value in session.get_overridable_initializers() if "lora_B" in value.name]
    empty = {value.name: np.zeros(value.shape, mixed.dtype) for value in stacks}
    without = session.run([output], {**feeds, **empty})[0]
    same = np.abs(without - base).max() < 1e-5
    print(f"with zeros fed in place of {len(stacks)} stacks of B every row is the base: {same}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
