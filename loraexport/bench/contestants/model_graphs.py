"""The modules and graphs of one model, for contestants of whole models: eager, ONNX, PEFT."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from ...bases.model import ModelModules, load_model_base
from ...bases.multi_lora_model import MultiLoraModel
from ...errors import UsageError
from ...export.onnx import export_model_onnx
from ...hf.inputs.signature import Signature
from ...hf.model import (
    has_rotary_positions,
    load_plain_model,
    model_class,
    no_progress_bar,
    read_task_config,
)
from ...hf.quiet import quiet_models
from ...hf.sentences.pooling import make_tail
from ...lora.model_sites import RowContext
from ...lora.rows import RowSlots
from ...plan.model import ModelPlan
from ...plan.plan import Plan, make_plan
from ...tensors import to_torch
from ..workloads.projects import Lab, adapter_names, model_spec
from ..workloads.schema import ModelWorkload
from .bound_graph import BoundGraph, require_kernels
from .eager import with_loop, wrap_with_peft
from .variants import plan_variant


class ModelGraphs:
    """The modules and graphs of some adapters of one rank, whatever the batch."""

    def __init__(self, workload: ModelWorkload, lab: Lab, adapters: int, rank: int) -> None:
        self.workload, self.lab, self.adapters, self.rank = workload, lab, adapters, rank
        self.plan = self._plan(adapters, workload.shapes[0].num_tokens)
        self.directory, self.task = self.plan.kind.directory, self.plan.kind.task
        self.tail = self.plan.kind.tail
        self.inputs, self.outputs = self.plan.kind.inputs, self.plan.kind.outputs
        if "input_ids" not in [entry.name for entry in self.inputs]:
            kind = workload.config["model_type"]
            raise UsageError(f"workload {workload.name!r}: {kind!r} is no model of texts")
        self.mixed, self.graph = cache(self._mixed), cache(self._graph)
        self.stacks = cache(self._stacks)

    def _plan(
        self, slots: int, tokens: int, features: Any = None, **export: Any
    ) -> Plan[ModelPlan]:
        """Tuned for the device and so many tokens, as a user would for such batches."""
        tune = {"device": self.lab.device.kind, "tokens": tokens}
        spec = model_spec(self.workload, self.lab, self.adapters, self.rank, tune=tune, **export)
        changes = {"adapters": spec.adapters[:slots], "features": features}
        # `model_spec` writes kind transformers.
        plan = make_plan(spec.model_copy(update=changes), self.lab.folder)
        return cast("Plan[ModelPlan]", plan)

    @cached_property
    def base(self) -> ModelModules:
        """The model as it is, in the form in which the project's export takes models."""
        model: Any = load_plain_model(self.directory, self.task, {})
        model = model.to(self.lab.dtype)
        tail = None if self.tail is None else make_tail(self.tail)
        signature = Signature(self.inputs, self.outputs)
        rotary = has_rotary_positions(model.config)
        context = RowContext(RowSlots(self.adapters))
        module = MultiLoraModel(model, self.task, signature, tail, context, [], rotary).eval()
        none: dict[str, Any] = {}
        return replace(
            self.mixed(self.workload.shapes[0].num_tokens),
            module=module,
            layers=(),
            stacks=none,
            base_rows=none,
            output_scales=none,
        )

    def _mixed(self, tokens: int) -> ModelModules:
        return load_model_base(self._plan(self.adapters, tokens))[1]

    def _graph(self, kind: str, captured: bool, tokens: int = 0) -> BoundGraph:
        """`base`, `mixed`, `kernels` (mixed, with functions that these take), `packed` (without
        padding), a variant, or `alone`: the mixed graph of one slot; tuned for so many tokens."""
        name = kind if kind == "base" else f"{kind}-{self.rank}-{self.adapters}-{tokens}"
        path, library, outlined = self.lab.folder / f"{name}.onnx", None, None
        if kind == "kernels":
            library = require_kernels(self.lab.device, self.lab.bench.dtype)
            outlined = self.adapters
        if not path.is_file():
            if kind == "alone":
                modules = load_model_base(self._plan(1, tokens))[1]
            elif kind in ("kernels", "packed"):
                modules = load_model_base(self._plan(self.adapters, tokens, **{kind: True}))[1]
            elif kind in self.workload.variants:
                plan = plan_variant(kind, partial(self._plan, self.adapters, tokens))
                modules = load_model_base(plan)[1]
            else:
                modules = self.base if kind == "base" else self.mixed(tokens)
            found = export_model_onnx(modules, kind, path, outlined)
            assert found or not outlined, "linear sites of a model have functions"
        return BoundGraph(path, self.lab.device, captured, library)

    def on_device(self, stacks: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: to_torch(stack).to(self.lab.device.torch) for name, stack in stacks.items()}

    def _stacks(self, tokens: int) -> dict[str, Tensor]:
        """Of the mixed graph."""
        return self.on_device(self.mixed(tokens).stacks)

    @cached_property
    def base_torch(self) -> nn.Module:
        self.graph("base", False)  # the export traces it on the CPU
        return self.base.module.to(self.lab.device.torch)

    @cached_property
    def eager(self) -> tuple[nn.Module, nn.Module, list[Tensor]]:
        """(masked, the seed's loop, the stacks of both), on the device."""
        tokens = self.workload.shapes[0].num_tokens  # of no matter here
        modules = load_model_base(self._plan(self.adapters, tokens, strategy="masked"))[1]
        loop = with_loop(copy.deepcopy(modules.module), modules.layers, self.adapters)
        stacks = list(self.on_device(modules.stacks).values())
        place = self.lab.device.torch
        return modules.module.to(place), loop.to(place), stacks

    @cached_property
    def peft(self) -> Any:
        config = read_task_config(self.directory, self.task)
        dtype = self.lab.dtype
        with quiet_models(), no_progress_bar():
            plain = model_class(config, self.task).from_pretrained(self.directory, dtype=dtype)
        folder = self.lab.folder / f"rank{self.rank}"
        plain = plain.to(self.lab.device.torch).eval()
        return wrap_with_peft(plain, folder, adapter_names(self.adapters))
