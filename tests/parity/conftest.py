"""What the tests of PEFT's features share."""

import pytest
import torch
from support.home import Home
from support.peft_features import World


@pytest.fixture(scope="session")
def world(home: Home) -> World:
    """The bases, adapters and artifacts of PEFT's features, each made when first asked for."""
    torch.set_num_threads(1)
    return World(home)
