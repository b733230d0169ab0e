"""Contestants of the bench on the CPU kernels: stock operators' numbers, and an absence is said."""

import sys
from pathlib import Path
from typing import Any

import pytest
from support.bench import BERT, LAYERS, LLAMA, cells, contests


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("workload", "stock"),
    [
        (LAYERS, ("masked", "augmented")),
        pytest.param(
            LAYERS | {"ranks": [2, 4], "mix_ranks": True},
            ("masked", "augmented"),
            marks=pytest.mark.slow,
        ),
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
