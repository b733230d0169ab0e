"""Tiny workloads of the bench, and their cells with a few contestants alone."""

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraexport.bench.contest import Contest, run_contest
from loraexport.bench.contestants.generation import generation_contests
from loraexport.bench.contestants.layers import layer_contests
from loraexport.bench.contestants.model import model_contests
from loraexport.bench.device import Device
from loraexport.bench.results import Cell
from loraexport.bench.workloads.projects import Lab
from loraexport.bench.workloads.schema import Workloads

LAYERS: dict[str, Any] = {
    "kind": "layers",
    "name": "layer",
    "in_features": 32,
    "out_features": 32,
    "chain": 2,
    "adapters": [3],
    "ranks": [4],
    "tokens": [7],
    "rows": 3,
}
BERT: dict[str, Any] = {
    "kind": "model",
    "name": "bert",
    "config": {
        "model_type": "bert",
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    },
    "adapters": [2],
    "ranks": [4],
    "shapes": [{"rows": 3, "tokens": 5}],
}
LLAMA: dict[str, Any] = {
    "kind": "generation",
    "name": "llama",
    "config": {
        "model_type": "llama",
        "vocab_size": 80,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "adapters": [2],
    "ranks": [4],
    "rows": [3],
    "prompt_tokens": 5,
    "new_tokens": 6,
}
CONTESTS = {
    "layers": layer_contests,
    "model": model_contests,
    "generation": generation_contests,
}


def contests(
    folder: Path, workload: dict[str, Any], kind: str = "cpu"
) -> Iterator[tuple[Contest, Lab]]:
    """The contests of a workload as on a device of that kind; on this machine all run on a CPU."""
    data = {"version": 1, "name": "tiny", "device": "cpu", "threads": 1, "rounds": 3, "round_ms": 1}
    bench = Workloads.model_validate_json(json.dumps({**data, "workloads": [workload]}))
    device = Device("cpu", 1)
    device.kind = kind
    lab = Lab(folder, device, bench)
    (read,) = bench.workloads
    make: Any = CONTESTS[read.kind]
    with device.active():
        for contest in make(read, lab):
            yield contest, lab


def cells(folder: Path, workload: dict[str, Any], names: Collection[str]) -> list[Cell]:
    """The cells of a workload with these contestants alone."""
    found = []
    for contest, lab in contests(folder, workload):
        chosen = [one for one in contest.contestants if one.name in names]
        found.append(run_contest(replace(contest, contestants=chosen), lab.bench, lab.device))
    return found
