"""Contestants of `kind: layers`: a chain of equal linear layers, rows as segments of tokens.

Outputs of all are compared on up to 1,024 tokens, spread over the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...bases.weights import Base
from ...plan.costs import WITH_KERNELS
from ...tensors import to_numpy
from ..contest import KERNELS, Contest, Contestant, peers
from ..floors import site_floors
from ..results import Cell
from ..work import CannotRun, Work, run_in_turn
from ..workloads.batches import draw_slots, even_bounds, rows_by_slot
from ..workloads.projects import Lab, adapter_names
from ..workloads.schema import LayersWorkload
from .compiled import BoundInputs, compile_module
from .layer_graphs import LayerGraphs

_COMPARED = 1024


def layer_contests(workload: LayersWorkload, lab: Lab) -> Iterator[Contest]:
    """A contest for every number of adapters, rank and number of tokens."""
    base: Base | None = None
    for ranks in workload.rank_sets:
        for adapters in workload.adapters:
            chains = LayerGraphs(workload, lab, adapters, ranks, base)
            base = chains.base
            for tokens in workload.tokens:
                yield _Tokens(chains, tokens).contest()


class _Tokens:
    """One batch: its inputs, and who runs it."""

    def __init__(self, chains: LayerGraphs, tokens: int) -> None:
        self._chains, self._lab, workload = chains, chains.lab, chains.workload
        self.tokens, self._units = tokens, workload.chain
        rows = min(workload.rows or chains.adapters, tokens)
        seed = self._lab.bench.seed
        self.slots = draw_slots(workload.distribution, rows, chains.adapters, seed)
        self.bounds = even_bounds(tokens, rows)
        torch.manual_seed(seed)
        nbytes = self._lab.dtype.itemsize * tokens * workload.in_features
        self.copies = [
            torch.randn(tokens, workload.in_features).to(self._lab.device.torch, self._lab.dtype)
            for _ in range(self._lab.device.num_copies(nbytes))
        ]
        self._segments = (torch.tensor(self.bounds), torch.tensor(self.slots))
        self._device_segments = [one.to(self._lab.device.torch) for one in self._segments]
        self._shown = torch.linspace(0, tokens - 1, min(tokens, _COMPARED)).long()

    def contest(self) -> Contest:
        chains, workload = self._chains, self._chains.workload
        contestants = peers(self)
        names: list[str] = []
        for strategy in workload.strategies:
            names += [strategy, f"{strategy}{KERNELS}"] if strategy in WITH_KERNELS else [strategy]
        for name in names:
            contestants.append(Contestant(name, "mixed", partial(self.onnx, name, False)))
            if name != "segmented":  # its sizes depend on values
                captured = partial(self.onnx, name, True)
                contestants.append(Contestant(f"{name} captured", "mixed", captured))
        used = set(self.slots)
        ranks = [chains.ranks[(slot - 1) % len(chains.ranks)] for slot in used]
        cell = Cell(
            workload=workload.name,
            kind="layers",
            phase="",
            unit="layer",
            adapters=chains.adapters,
            used=len(used),
            rank=chains.rank,
            ranks=tuple(chains.ranks) if len(chains.ranks) > 1 else (),
            rows=len(self.slots),
            tokens=self.tokens,
            floors=site_floors(
                chains.own_plan,
                self.tokens,
                len(used),
                self._lab.device,
                workload.chain,
                sum(ranks) / len(ranks) / chains.rank,
            ),
        )
        return Contest(cell, contestants, self._ours(), workload.leave_out)

    def _ours(self) -> list[str]:
        """What `auto` would choose, with kernels where the runtime takes them of its own accord."""
        chains = self._chains
        chosen = chains.chosen(self.tokens)
        others = [one for one in chains.workload.strategies if one != chosen]
        ours = [f"{chosen} captured", chosen, *others]
        if self._lab.device.takes_kernels:
            name = f"{chains.chosen(self.tokens, kernels=True)}{KERNELS}"
            ours = [f"{name} captured", name, *ours]
        return ours

    def _work(self, calls: Sequence[Callable[[], Any]], read: Callable[[], Tensor]) -> Work:
        def output() -> np.ndarray:
            return to_numpy(read()[self._shown.to(self._lab.device.torch)])

        return Work(calls, output, self._units)

    def _eager(self, run: Callable[[Tensor], Tensor]) -> Work:
        return self._work(
            [partial(run, x) for x in self.copies],
            lambda: run(self.copies[0]),
        )

    def base_torch(self) -> Work:
        return self._eager(self._chains.modules["base"])

    def base_compiled(self) -> Work:
        return self._eager(compile_module(self._chains.modules["base"], self.copies[0]))

    def loop(self) -> Work:
        loop = self._chains.modules["loop"]
        return self._eager(lambda x: loop(x, *self._segments))

    def masked(self) -> Work:
        module, stacks = self._chains.modules["masked"], [*self._chains.device_stacks.values()]
        return self._eager(lambda x: module(x, *self._device_segments, stacks))

    def masked_compiled(self) -> Work:
        module, stacks = self._chains.modules["masked"], [*self._chains.device_stacks.values()]
        bound = BoundInputs(module, self._device_segments, stacks)
        return self._eager(compile_module(bound, self.copies[0]))

    def peft(self) -> Work:
        """`adapter_names`, a name for each row; rows of different lengths: one for each token."""
        model, names = self._chains.peft, adapter_names(self._chains.adapters)
        lengths = {end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)}
        per_row = lengths.pop() if len(lengths) == 1 else 0
        repeats = np.diff(self.bounds) if not per_row else 1
        slots = np.repeat(self.slots, repeats)
        rows = [names[slot - 1] for slot in slots]

        def run(x: Tensor) -> Tensor:
            shaped = x.view(len(rows), per_row, -1) if per_row else x
            y: Tensor = model(shaped, adapter_names=rows)
            return y.view(len(x), -1)

        return self._eager(run)

    def onnx(self, kind: str, captured: bool) -> Work:
        graph = self._chains.graph(kind, captured)
        segments: dict[str, Tensor] = {}
        if kind != "base":
            on_device = [segment.to(self._lab.device.torch) for segment in self._segments]
            segments = dict(zip(("seg_indptr", "seg_slots"), on_device, strict=True))
        outputs = [self._empty(self.tokens) for _ in self.copies]
        calls = [
            graph.bind({"x": x, **segments}, {"y": y})
            for x, y in zip(self.copies, outputs, strict=True)
        ]
        return self._work(calls, lambda: outputs[0])

    def one_at_a_time(self) -> Work:
        """A graph of plain LoRA, run once for each adapter of the batch over its own tokens.

        What switching adapters in onnxruntime can cost at least: A and B of every adapter are on
        the device already and only bound; the tokens are sorted by adapter beforehand, and the
        outputs stay so.
        """
        if len(self._chains.ranks) > 1:
            raise CannotRun("its graph has one rank, and these adapters have several")
        graph, stacks = self._chains.graph("alone", False), self._chains.device_stacks
        groups = rows_by_slot(self.slots)
        order = {
            slot: torch.cat([torch.arange(self.bounds[row], self.bounds[row + 1]) for row in rows])
            for slot, rows in groups.items()
        }
        rank = self._chains.rank
        outputs: list[dict[int, Tensor]] = []
        calls: list[Callable[[], Any]] = []
        for x in self.copies:
            parts, runs = {}, []
            for slot, tokens in order.items():
                slot_x = x[tokens.to(x.device)]
                parts[slot] = self._empty(len(slot_x))
                bound = {
                    name: stack[(slot - 1) * rank : slot * rank] for name, stack in stacks.items()
                }
                runs.append(graph.bind({"x": slot_x, **bound}, {"y": parts[slot]}))
            outputs.append(parts)
            calls.append(partial(run_in_turn, runs))

        def read() -> Tensor:
            y = self._empty(self.tokens)
            for slot, tokens in order.items():
                y[tokens.to(y.device)] = outputs[0][slot]
            return y

        return self._work(calls, read)

    def _empty(self, tokens: int) -> Tensor:
        size = (tokens, self._chains.workload.out_features)
        return torch.empty(size, device=self._lab.device.torch, dtype=self._lab.dtype)
