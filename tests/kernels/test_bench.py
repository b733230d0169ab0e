"""Contestants of the bench on the CPU kernels: stock operators' numbers, and an absence is said."""

import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("workload", "stock"),
    [
        (LAYERS, ("masked", "augmented")),
        (LAYERS | {"ranks": [2, 4], "mix_ranks": True}, ("masked", "augmented")),
        pytest.param(BERT, ("mixed",), marks=pytest.mark.slow),
        pytest.param(LLAMA, ("mixed", "mixed runtime"), marks=pytest.mark.slow),
        pytest.param(LLAMA | {"weights": "int4"}, ("mixed",), marks=pytest.mark.slow),
    ],
    ids=["layers", "mixed-ranks", "model", "decoder", "int4"],
)
def test_they_give_the_numbers_of_stock_operators(
    tmp_path: Path, workload: dict[str, Any], stock: tuple[str, ...]
) -> None:
    with_kernels = {name: name.replace(" runtime", "") + " kernels" for name in stock}
    with_kernels |= {name: "mixed kernels runtime" for name in stock if "runtime" in name}
    names = {"base", *stock, *with_kernels.values()}
    for cell in cells(tmp_path, workload, names):
        ran = {entry.name for entry in cell.entries}
        assert ran == {name for name in names if "runtime" not in name or cell.phase == "decode"}
        assert cell.left_out == {}
        assert cell.ours == stock[0], "on a CPU the runtime takes no kernels of its own accord"
        assert cell.fastest_base == "base"


@pytest.mark.parametrize(
    "workload",
    [LAYERS, *(pytest.param(one, marks=pytest.mark.slow) for one in (BERT, LLAMA))],
    ids=["layers", "model", "decoder"],
)
def test_on_cuda_they_are_ours(tmp_path: Path, workload: dict[str, Any]) -> None:
    """Where they run; of layers by the strategy that `auto` takes with export.kernels."""
    name = "augmented kernels" if workload is LAYERS else "mixed kernels"
    for contest, _ in contests(tmp_path, workload, kind="cuda"):
        captured = "" if contest.cell.phase == "prefill" else " captured"
        first, *others = contest.ours
        assert first == f"{name}{captured}"
        stock = name.removesuffix(" kernels")
        assert {f"{stock}{captured}", stock} <= set(others), "else stock operators"
        assert {first, stock} <= {one.name for one in contest.contestants}


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["masked", "masked kernels", "augmented kernels captured"]
    monkeypatch.setitem(sys.modules, "loraexport_kernels", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (cell,) = cells(tmp_path, LAYERS, names)
    why = "loraexport-kernels is not installed; pip install ./runtime/kernels"
    assert cell.left_out == dict.fromkeys(names[1:], why)
    assert [entry.name for entry in cell.entries] == ["masked"]
