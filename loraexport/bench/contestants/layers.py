"""Contestants of `kind: layers`: a chain of equal linear layers, rows as segments of tokens.

Outputs of all are compared on up to 1,024 tokens, spread over the batch.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...bases.adapters import load_adapters
from ...bases.layers import LayerModules, build_modules, load_layers_base
from ...bases.weights import Base
from ...plan.layers import LayersPlan
from ...plan.plan import Plan, make_plan
from ...tensors import to_numpy, to_torch
from ..contest import Contest, Contestant, peers
from ..floors import site_floors
from ..results import Cell
from ..work import Work, run_in_turn
from ..workloads.batches import draw_slots, even_bounds, rows_by_slot
from ..workloads.projects import Lab, adapter_names, layers_spec
from ..workloads.schema import LayersWorkload
from .bound_graph import BoundGraph
from .chain import AloneChain, BaseChain, LoopChain, MixedChain, export_chain
from .eager import wrap_with_peft

_COMPARED = 1024


def layer_contests(workload: LayersWorkload, lab: Lab) -> Iterator[Contest]:
    """A contest for every number of adapters, rank and number of tokens."""
    base: Base | None = None
    for rank in workload.ranks:
        for adapters in workload.adapters:
            chains = _Chains(workload, lab, adapters, rank, base)
            base = chains.base
            for tokens in workload.tokens:
                yield _Tokens(chains, tokens).contest()


class _Chains:
    """The modules and graphs of some adapters of one rank, whatever the tokens."""

    def __init__(
        self, workload: LayersWorkload, lab: Lab, adapters: int, rank: int, base: Base | None
    ) -> None:
        self.workload, self.lab, self.adapters, self.rank = workload, lab, adapters, rank
        plan = self.plan("segmented")
        self.base = base or load_layers_base(plan)  # it does not depend on the adapters
        self.own_plan = plan
        self._weights = load_adapters(plan, self.base)
        self.layers = cache(self._layers)
        self.graph = cache(self._graph)

    def plan(self, strategy: str, tokens: int = 1) -> Plan[LayersPlan]:
        tune = {"device": self.lab.device.kind, "tokens": tokens}
        spec = layers_spec(
            self.workload, self.lab, self.adapters, self.rank, strategy=strategy, tune=tune
        )
        # `layers_spec` writes kind layers.
        return cast("Plan[LayersPlan]", make_plan(spec, self.lab.folder))

    def _layers(self, strategy: str) -> tuple[LayerModules, ...]:
        return build_modules(self.plan(strategy), self.base, self._weights)

    def stacks(self, strategy: str) -> dict[str, np.ndarray]:
        """By name, a and b of each layer in turn."""
        layers = self.layers(strategy)
        return {name: value for layer in layers for name, value in layer.stacks.items()}

    def _graph(self, kind: str, captured: bool) -> BoundGraph:
        """`base`, `alone` (one adapter for all tokens), or a strategy."""
        shared = {"base": "base", "alone": f"alone-{self.rank}"}
        name = shared.get(kind, f"{kind}-{self.rank}-{self.adapters}")
        path = self.lab.folder / f"{name}.onnx"
        if not path.is_file():
            layers = self.layers("masked" if kind in shared else kind)
            stacks = {} if kind == "base" else self.stacks("masked" if kind == "alone" else kind)
            if kind == "alone":
                stacks = {key: value[: self.rank] for key, value in stacks.items()}
            make = {"base": BaseChain, "alone": AloneChain}.get(kind, MixedChain)
            export_chain(make(layers), layers, stacks, self.lab.bench.dtype, path)
        return BoundGraph(path, self.lab.device, captured)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The eager chains, on the device; the export traces the others on the CPU."""
        layers = copy.deepcopy(self.layers("masked"))
        chains = {
            "base": BaseChain(layers),
            "loop": LoopChain(layers),
            "masked": MixedChain(layers),
        }
        return {name: chain.to(self.lab.device.torch).eval() for name, chain in chains.items()}

    @cached_property
    def device_stacks(self) -> dict[str, Tensor]:
        """The masked strategy's."""
        values = self.stacks("masked").items()
        return {name: to_torch(value).to(self.lab.device.torch) for name, value in values}

    @cached_property
    def peft(self) -> Any:
        """The chain as torch.nn.Linear layers, wrapped by PEFT with every adapter."""
        plain = nn.Sequential()
        for layer in self.layers("masked"):
            base = layer.segmented.base
            assert base.weight is not None, "a masked layer has its weight"
            assert base.bias is not None, "the layers of a workload have one"
            size_out, size_in = base.weight.shape
            linear = nn.Linear(size_in, size_out, device="meta")
            linear.weight = nn.Parameter(base.weight, requires_grad=False)
            linear.bias = nn.Parameter(base.bias, requires_grad=False)
            plain.add_module(layer.layer.name, linear)
        plain = plain.to(self.lab.device.torch)
        folder = self.lab.folder / f"rank{self.rank}"
        return wrap_with_peft(plain, folder, adapter_names(self.adapters))


class _Tokens:
    """One batch: its inputs, and who runs it."""

    def __init__(self, chains: _Chains, tokens: int) -> None:
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
        self._shown = torch.linspace(0, tokens - 1, min(tokens, _COMPARED)).long()

    def contest(self) -> Contest:
        chains, workload = self._chains, self._chains.workload
        contestants = peers(self)
        for strategy in workload.strategies:
            contestants.append(Contestant(strategy, "mixed", partial(self.onnx, strategy, False)))
            if strategy != "segmented":  # its sizes depend on values
                captured = partial(self.onnx, strategy, True)
                contestants.append(Contestant(f"{strategy} captured", "mixed", captured))
        chosen = chains.plan("auto", self.tokens).layers[0].layer.strategy
        ours = [chosen, *(strategy for strategy in workload.strategies if strategy != chosen)]
        used = len(set(self.slots))
        cell = Cell(
            workload=workload.name,
            kind="layers",
            phase="",
            unit="layer",
            adapters=chains.adapters,
            used=used,
            rank=chains.rank,
            rows=len(self.slots),
            tokens=self.tokens,
            floors=site_floors(
                chains.own_plan, self.tokens, used, self._lab.device, workload.chain
            ),
        )
        return Contest(cell, contestants, [f"{ours[0]} captured", *ours], workload.leave_out)

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

    def loop(self) -> Work:
        loop = self._chains.modules["loop"]
        return self._eager(lambda x: loop(x, *self._segments))

    def masked(self) -> Work:
        module, stacks = self._chains.modules["masked"], [*self._chains.device_stacks.values()]
        segments = [segment.to(self._lab.device.torch) for segment in self._segments]
        return self._eager(lambda x: module(x, *segments, stacks))

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
