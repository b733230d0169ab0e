"""torch.compile as a contestant: the numbers of the module, and why it cannot run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench import BERT, LAYERS, cells
from torch import Tensor, nn

from loraexport.bench.contestants.compiled import BoundInputs, compile_module
from loraexport.bench.work import CannotRun


class Product(nn.Module):
    """first * control + the sum of the stacks."""

    def forward(self, first: Tensor, control: Tensor, stacks: list[Tensor]) -> Tensor:
        total = first * control
        for stack in stacks:
            total = total + stack
        return total


FIRST = torch.arange(3.0)
BOUND = BoundInputs(Product(), [torch.tensor(2.0)], [torch.ones(3), torch.full((3,), 4.0)])


def test_inputs_that_stay_are_buffers() -> None:
    """A CUDA graph reads these in place, and they go where the module goes."""
    assert len(dict(BOUND.named_buffers())) == 3
    assert not BOUND.state_dict()
    torch.testing.assert_close(BOUND(FIRST), 2 * FIRST + 5)


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "backend='inductor' raised:\n\nInvalidCxxCompiler: No working C++ compiler\nand more"

    def compile_nothing(module: nn.Module, **options: Any) -> Any:
        assert options == {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}

        def run(first: Any) -> Any:
            raise RuntimeError(said)

        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    expected = (
        "torch.compile: backend='inductor' raised: InvalidCxxCompiler: No working C++ compiler"
    )
    with pytest.raises(CannotRun) as caught:
        compile_module(BOUND, FIRST)
    assert str(caught.value) == expected


@pytest.fixture
def fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_it_gives_what_the_module_gives() -> None:
    with torch.no_grad():
        compiled = compile_module(BOUND, FIRST)
        torch.testing.assert_close(compiled(FIRST), 2 * FIRST + 5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_without_a_compiler() -> None:
    """Of this torch the message itself."""
    from torch._inductor import config

    lacking: Any = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        config.patch(lacking),
        torch.no_grad(),
        pytest.raises(CannotRun, match=r"torch\.compile: .*[Cc]ompiler"),
    ):
        compile_module(BOUND, FIRST)


@pytest.mark.slow
@pytest.mark.parametrize("workload", [LAYERS, BERT], ids=["layers", "model"])
def test_the_base_and_the_masked_strategy(tmp_path: Path, workload: dict[str, Any]) -> None:
    """Within rounding of onnxruntime's base, and of the strategy in eager torch."""
    names = {"base", "base torch.compile", "masked torch", "masked torch.compile"}
    (cell,) = cells(tmp_path, workload, names)
    assert cell.left_out == {}
    assert {entry.name for entry in cell.entries} == names
