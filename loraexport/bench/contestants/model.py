"""Contestants of `kind: model`: a whole model of texts.

Outputs of all are compared on the first 8 features of every token that is not padding.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Stack

from ...bases.model import ModelModules, load_model_base
from ...bases.multi_lora_model import MultiLoraModel
from ...errors import UsageError
from ...export.onnx import export_model_onnx
from ...hf.model import (
    has_rotary_positions,
    load_plain_model,
    model_class,
    no_progress_bar,
    read_config,
    take_output,
)
from ...hf.pooling import SentencePooling
from ...hf.quiet import quiet_models
from ...hf.skeleton import Signature
from ...lora.model_sites import RowContext
from ...lora.rows import RowSlots
from ...plan.model import ModelPlan
from ...plan.plan import Plan, make_plan
from ...tensors import to_numpy, to_torch
from ..contest import Contest, Contestant, peers
from ..floors import site_floors
from ..results import Cell
from ..work import Work, run_in_turn
from ..workloads.batches import draw_slots, rows_by_slot, spread_lengths
from ..workloads.projects import Lab, adapter_names, model_spec
from ..workloads.schema import ModelWorkload, Shape
from .bound_graph import BoundGraph
from .eager import with_loop, wrap_with_peft
from .variants import plan_variant, variant_contestants

_COMPARED = 8


def model_contests(workload: ModelWorkload, lab: Lab) -> Iterator[Contest]:
    """A contest for every number of adapters, rank and shape."""
    for rank in workload.ranks:
        for adapters in workload.adapters:
            model = _Model(workload, lab, adapters, rank)
            for shape in workload.shapes:
                yield _Batch(model, shape).contest()


class _Model:
    """The modules and graphs of some adapters of one rank, whatever the batch."""

    def __init__(self, workload: ModelWorkload, lab: Lab, adapters: int, rank: int) -> None:
        self.workload, self.lab, self.adapters, self.rank = workload, lab, adapters, rank
        self.plan = self._plan(adapters, workload.shapes[0].num_tokens)
        self.directory, self.task = self.plan.kind.directory, self.plan.kind.task
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
        pooling = None
        if self.task == "sentence-embedding":
            pooling = SentencePooling.read(self.directory)
        signature = Signature(self.inputs, self.outputs)
        rotary = has_rotary_positions(model.config)
        context = RowContext(RowSlots(self.adapters))
        module = MultiLoraModel(model, signature, pooling, context, [], rotary).eval()
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
        """`base`, `mixed`, `packed` (mixed, without padding), a variant, or `alone`: the mixed
        graph of one slot; tuned for so many tokens."""
        name = kind if kind == "base" else f"{kind}-{self.rank}-{self.adapters}-{tokens}"
        path = self.lab.folder / f"{name}.onnx"
        if not path.is_file():
            if kind == "alone":
                modules = load_model_base(self._plan(1, tokens))[1]
            elif kind == "packed":
                modules = load_model_base(self._plan(self.adapters, tokens, packed=True))[1]
            elif kind in self.workload.variants:
                plan = plan_variant(kind, partial(self._plan, self.adapters, tokens))
                modules = load_model_base(plan)[1]
            else:
                modules = self.base if kind == "base" else self.mixed(tokens)
            export_model_onnx(modules, kind, path)
        return BoundGraph(path, self.lab.device, captured)

    def on_device(self, stacks: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: to_torch(one).to(self.lab.device.torch) for name, one in stacks.items()}

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
        config = read_config(self.directory, self.task)
        dtype = self.lab.dtype
        with quiet_models(), no_progress_bar():
            plain = model_class(config, self.task).from_pretrained(self.directory, dtype=dtype)
        folder = self.lab.folder / f"rank{self.rank}"
        plain = plain.to(self.lab.device.torch).eval()
        return wrap_with_peft(plain, folder, adapter_names(self.adapters))


class _Batch:
    """One batch: its inputs, and who runs it."""

    def __init__(self, model: _Model, shape: Shape) -> None:
        self._model, self._lab, self.shape = model, model.lab, shape
        seed, device = self._lab.bench.seed, self._lab.device
        self.slots = draw_slots(model.workload.distribution, shape.rows, model.adapters, seed)
        self._ids = torch.tensor(self.slots)
        self._size = model.outputs[0].sizes(shape.rows, shape.tokens)
        torch.manual_seed(seed)
        vocabulary = transformers.AutoConfig.from_pretrained(model.directory).vocab_size
        lengths = spread_lengths(shape.rows, shape.tokens, model.workload.fill)
        self._real = torch.arange(shape.tokens) < torch.tensor(lengths).unsqueeze(1)
        self.copies = []
        for _ in range(device.num_copies(8 * shape.rows * shape.tokens)):
            ids = torch.randint(1, vocabulary, (shape.rows, shape.tokens)).to(device.torch)
            known = {
                "input_ids": ids,
                "attention_mask": self._real.to(ids),
                "token_type_ids": torch.zeros_like(ids),
            }
            self.copies.append({one.name: known[one.name] for one in model.inputs})

    def contest(self) -> Contest:
        model, workload = self._model, self._model.workload
        found = [
            *peers(self),
            Contestant("mixed", "mixed", partial(self.onnx, "mixed", False)),
            Contestant("mixed captured", "mixed", partial(self.onnx, "mixed", True)),
        ]
        found += variant_contestants(workload.variants, self.onnx)
        ours = ["mixed captured", "mixed"]
        if workload.fill < 1:
            packed = partial(self.onnx, "packed", False)
            found.append(Contestant("mixed packed", "mixed", packed))
            ours.insert(0, "mixed packed")
        tokens = self.shape.num_tokens
        used = len(set(self.slots))
        cell = Cell(
            workload=workload.name,
            kind="model",
            phase="",
            unit="batch",
            adapters=model.adapters,
            used=used,
            rank=model.rank,
            rows=self.shape.rows,
            tokens=tokens,
            floors=site_floors(model.plan, tokens, used, self._lab.device),
        )
        return Contest(cell, found, ours, workload.leave_out)

    def _work(self, calls: Sequence[Callable[[], Any]], read: Callable[[], Tensor]) -> Work:
        def output() -> np.ndarray:
            y = to_numpy(read()[..., :_COMPARED])
            return y[self._real.numpy()] if y.ndim > 2 else y  # of padding all differ

        return Work(calls, output)

    def _eager(self, run: Callable[[dict[str, Tensor]], Tensor]) -> Work:
        calls = [partial(run, inputs) for inputs in self.copies]
        return self._work(calls, lambda: run(self.copies[0]))

    def base_torch(self) -> Work:
        module = self._model.base_torch
        return self._eager(lambda inputs: module(inputs, self._ids, []))

    def loop(self) -> Work:
        _, module, stacks = self._model.eager
        return self._eager(lambda inputs: module(inputs, self._ids, stacks))

    def masked(self) -> Work:
        module, _, stacks = self._model.eager
        ids = self._ids.to(self._lab.device.torch)
        return self._eager(lambda inputs: module(inputs, ids, stacks))

    def peft(self) -> Work:
        model, names = self._model.peft, adapter_names(self._model.adapters)
        rows = [names[slot - 1] for slot in self.slots]
        pooling = self._model.base.module.pooling

        def run(inputs: dict[str, Tensor]) -> Tensor:
            y = take_output(model(**inputs, adapter_names=rows))
            return y if pooling is None else pooling(y, inputs["attention_mask"])

        return self._eager(run)

    def onnx(self, kind: str, captured: bool) -> Work:
        tokens = 0 if kind == "base" else self.shape.num_tokens
        graph, name = self._model.graph(kind, captured, tokens), self._model.outputs[0].name
        control = {"adapter_ids": self._ids.to(self._lab.device.torch)}
        control = {key: one for key, one in control.items() if key in graph.inputs}
        outputs = [self._empty(self._size) for _ in self.copies]
        calls = [
            graph.bind({**inputs, **control}, {name: y})
            for inputs, y in zip(self.copies, outputs, strict=True)
        ]
        return self._work(calls, lambda: outputs[0])

    def one_at_a_time(self) -> Work:
        """The mixed graph of one slot, run once for each adapter of the batch over its own rows.

        The slot's A and B are bound: those of every adapter are on the device already. The rows
        are sorted by adapter beforehand, and the outputs stay so. A graph without a mask would
        save one `where` for each site.
        """
        tokens = self.shape.num_tokens
        graph, name = self._model.graph("alone", False, tokens), self._model.outputs[0].name
        by_name: dict[str, Stack] = {
            stack.name: stack
            for layer in self._model.mixed(tokens).layers
            for stack in layer.stacks
        }
        groups = rows_by_slot(self.slots)
        outputs: list[dict[int, Tensor]] = []
        calls: list[Callable[[], Any]] = []
        for inputs in self.copies:
            parts, runs = {}, []
            for slot, rows in groups.items():
                feeds = {key: one[rows].contiguous() for key, one in inputs.items()}
                feeds["adapter_ids"] = torch.ones(len(rows), dtype=torch.int64).to(
                    self._lab.device.torch
                )
                for key, stack in self._model.stacks(tokens).items():
                    own, ahead = stack[by_name[key].rows(slot)], by_name[key].row_offset
                    feeds[key] = torch.cat([stack[:ahead], own]) if ahead else own
                parts[slot] = self._empty([len(rows), *self._size[1:]])
                runs.append(graph.bind(feeds, {name: parts[slot]}))
            outputs.append(parts)
            calls.append(partial(run_in_turn, runs))

        def read() -> Tensor:
            y = self._empty(self._size)
            for slot, rows in groups.items():
                y[rows] = outputs[0][slot]
            return y

        return self._work(calls, read)

    def _empty(self, size: Sequence[int]) -> Tensor:
        return torch.empty(list(size), device=self._lab.device.torch, dtype=self._lab.dtype)
