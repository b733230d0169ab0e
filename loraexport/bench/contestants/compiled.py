"""Eager modules by torch.compile, in the mode that replays CUDA graphs where there is CUDA."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..work import CannotRun


class BoundInputs(nn.Module):
    """A module of whose inputs all but the first stay.

    As buffers a CUDA graph reads them where they lie; the others it copies at every call.
    """

    def __init__(
        self, module: nn.Module, control: Sequence[Tensor], stacks: Sequence[Tensor]
    ) -> None:
        """
        Args:
            control, stacks: the other inputs, these as a list, which comes last.
        """
        super().__init__()
        self.module, self._sizes = module, (len(control), len(stacks))
        for index, tensor in enumerate((*control, *stacks)):
            self.register_buffer(f"input{index}", tensor, persistent=False)

    def forward(self, first: Any) -> Tensor:
        """What the module gives for its first input, a tensor or a dictionary of them."""
        control, stacks = self._sizes
        bound = [getattr(self, f"input{index}") for index in range(control + stacks)]
        return self.module(first, *bound[:control], bound[control:])


def compile_module(module: nn.Module, first: Any) -> Any:
    """The module for inputs of the sizes of `first`, compiled whole.

    Raises:
        CannotRun: torch cannot compile it here, and why.
    """
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True, dynamic=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they speak of torch's own code, not of ours
            compiled(first)
    except Exception as error:  # a compiler that is missing, a part that cannot be traced
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = " ".join(lines[:2]) or type(error).__name__
        raise CannotRun(f"torch.compile: {what}") from error
    return compiled
