"""What the CUDA kernels compute, by an emulation on a CPU; and the library of nvcc loads there.

The emulation knows warps and blocks, but neither a memory model nor a clock: races and speed show
on a device alone, by runtime/kernels/bench.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.kernels import Graph, assert_right, random_site

pytestmark = pytest.mark.slow


@pytest.fixture
def kernels(check: ModuleType, emulated: Path) -> Any:
    torch.manual_seed(0)
    return check.Kernels(str(emulated), "cpu")


def test_routes(check: ModuleType, kernels: Any) -> None:
    check.check_routes(kernels, [1, 127, 128])
    check.check_routes(kernels, [129, 300], [8, 600])


def test_values(check: ModuleType, kernels: Any) -> None:
    check.check_values(kernels, 12, 60)


def test_a_row_stands_alone(check: ModuleType, kernels: Any) -> None:
    check.check_alone(kernels, rows=20, dtypes=[torch.float16])


def test_the_library_of_nvcc_runs_on_a_cpu(cuda_library: Path) -> None:
    """It needs no CUDA to be loaded."""
    site = random_site(1, outs=(8, 16), bias=True)
    assert_right(site, Graph(site, cuda_library).run(site))
