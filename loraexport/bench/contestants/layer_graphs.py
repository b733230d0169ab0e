"""The modules and graphs of a chain of layers, for its contestants: eager, ONNX, PEFT."""

import copy
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Strategy

from ...bases.adapters import load_adapters
from ...bases.layers import LayerModules, build_modules, load_layers_base
from ...bases.weights import Base
from ...plan.layers import LayersPlan
from ...plan.plan import Plan, make_plan
from ...tensors import to_torch
from ..contest import KERNELS
from ..workloads.projects import Lab, adapter_names, adapters_folder, layers_spec
from ..workloads.schema import LayersWorkload
from .bound_graph import BoundGraph, require_kernels
from .chain import AloneChain, BaseChain, LoopChain, MixedChain, export_chain
from .eager import wrap_with_peft


class LayerGraphs:
    """The modules and graphs of some adapters, which take some ranks in turn, whatever the
    tokens."""

    def __init__(
        self,
        workload: LayersWorkload,
        lab: Lab,
        adapters: int,
        ranks: Sequence[int],
        base: Base | None,
    ) -> None:
        self.workload, self.lab, self.adapters = workload, lab, adapters
        self.ranks, self.rank = ranks, max(ranks)
        plan = self.plan("segmented")
        self.base = base or load_layers_base(plan)  # it does not depend on the adapters
        self.own_plan = plan
        self._weights = load_adapters(plan, self.base)
        self.layers = cache(self._layers)
        self.graph = cache(self._graph)

    def plan(self, strategy: str, tokens: int = 1, kernels: bool = False) -> Plan[LayersPlan]:
        export = {
            "strategy": strategy,
            "tune": {"device": self.lab.device.kind, "tokens": tokens},
            "kernels": kernels,
        }
        spec = layers_spec(self.workload, self.lab, self.adapters, self.ranks, **export)
        # `layers_spec` writes kind layers.
        return cast("Plan[LayersPlan]", make_plan(spec, self.lab.folder))

    def chosen(self, tokens: int, kernels: bool = False) -> Strategy:
        """What `auto` takes, with export.kernels or without."""
        return self.plan("auto", tokens, kernels).layers[0].layer.strategy

    def _layers(self, strategy: str) -> tuple[LayerModules, ...]:
        return build_modules(self.plan(strategy), self.base, self._weights)

    def stacks(self, strategy: str) -> dict[str, np.ndarray]:
        """By name, a and b of each layer in turn."""
        layers = self.layers(strategy)
        return {name: value for layer in layers for name, value in layer.stacks.items()}

    def _graph(self, kind: str, captured: bool) -> BoundGraph:
        """`base`, `alone` (one adapter for all tokens), a strategy, or one with kernels."""
        device, dtype = self.lab.device, self.lab.bench.dtype
        library = require_kernels(device, dtype) if kind.endswith(KERNELS) else None
        shared = {"base": "base", "alone": f"alone-{self.rank}"}
        name = shared.get(kind, f"{kind}-{adapters_folder(self.ranks)}-{self.adapters}")
        path = self.lab.folder / f"{name}.onnx"
        if not path.is_file():
            strategy = "masked" if kind in shared else kind.removesuffix(KERNELS)
            layers = self.layers(strategy)
            stacks = {} if kind == "base" else self.stacks(strategy)
            if kind == "alone":
                stacks = {key: value[: self.rank] for key, value in stacks.items()}
            make = {"base": BaseChain, "alone": AloneChain}.get(kind, MixedChain)
            outlined = None if library is None else self.adapters
            export_chain(make(layers), layers, stacks, dtype, path, outlined)
        return BoundGraph(path, device, captured, library)

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
        folder = self.lab.folder / adapters_folder(self.ranks)
        return wrap_with_peft(plain, folder, adapter_names(self.adapters))
