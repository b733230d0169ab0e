"""What the tests of PEFT's features share."""

import os

import pytest
import torch
from support.peft_features import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = tmp_path_factory.getbasetemp().parent / "peft-features"
        shared.mkdir(exist_ok=True)
        return World(shared)
    return World(tmp_path_factory.mktemp("peft-features"))
