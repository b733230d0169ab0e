"""Contestants of `kind: model`: a whole model of texts.

Outputs of all are compared on the first 8 features of every token that is not padding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from loraexport_runtime.contract.manifest import Stack

from ...hf.model import take_output
from ...tensors import to_numpy
from ..contest import MIXED_KERNELS, Contest, Contestant, peers
from ..floors import site_floors
from ..results import Cell
from ..work import Work, run_in_turn
from ..workloads.batches import draw_slots, rows_by_slot, spread_lengths
from ..workloads.projects import Lab, adapter_names
from ..workloads.schema import ModelWorkload, Shape
from .compiled import BoundInputs, compile_module
from .model_graphs import ModelGraphs
from .variants import variant_contestants

_COMPARED = 8


def model_contests(workload: ModelWorkload, lab: Lab) -> Iterator[Contest]:
    """A contest for every number of adapters, rank and shape."""
    for rank in workload.ranks:
        for adapters in workload.adapters:
            model = ModelGraphs(workload, lab, adapters, rank)
            for shape in workload.shapes:
                yield _Batch(model, shape).contest()


class _Batch:
    """One batch: its inputs, and who runs it."""

    def __init__(self, model: ModelGraphs, shape: Shape) -> None:
        self._model, self._lab, self.shape = model, model.lab, shape
        seed, device = self._lab.bench.seed, self._lab.device
        self.slots = draw_slots(model.workload.distribution, shape.rows, model.adapters, seed)
        self._ids = torch.tensor(self.slots)
        self._device_ids = self._ids.to(device.torch)
        self._size = model.outputs[0].sizes(shape.rows, shape.tokens)
        torch.manual_seed(seed)
        vocabulary = transformers.AutoConfig.from_pretrained(model.directory).vocab_size
        lengths = spread_lengths(shape.rows, shape.tokens, model.workload.fill)
        self._real = torch.arange(shape.tokens) < torch.tensor(lengths).unsqueeze(1)
        self.copies = []
        for _ in range(device.num_copies(8 * shape.rows * shape.tokens)):
            ids = torch.randint(1, vocabulary, (shape.rows, shape.tokens)).to(device.torch)
            inputs = {
                "input_ids": ids,
                "attention_mask": self._real.to(ids),
                "token_type_ids": torch.zeros_like(ids),
            }
            self.copies.append({entry.name: inputs[entry.name] for entry in model.inputs})

    def contest(self) -> Contest:
        model, workload = self._model, self._model.workload
        contestants = [
            *peers(self),
            Contestant("mixed", "mixed", partial(self.onnx, "mixed", False)),
            Contestant("mixed captured", "mixed", partial(self.onnx, "mixed", True)),
            Contestant(MIXED_KERNELS, "mixed", partial(self.onnx, "kernels", False)),
            Contestant(f"{MIXED_KERNELS} captured", "mixed", partial(self.onnx, "kernels", True)),
        ]
        contestants += variant_contestants(workload.variants, self.onnx)
        ours = ["mixed captured", "mixed"]
        if self._lab.device.takes_kernels:
            ours = [f"{MIXED_KERNELS} captured", MIXED_KERNELS, *ours]
        if workload.fill < 1:
            packed = partial(self.onnx, "packed", False)
            contestants.append(Contestant("mixed packed", "mixed", packed))
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
        return Contest(cell, contestants, ours, workload.leave_out)

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

    def base_compiled(self) -> Work:
        # With nothing on the host, or it is not captured.
        module = BoundInputs(self._model.base_torch, [self._device_ids], [])
        return self._eager(compile_module(module, self.copies[0]))

    def loop(self) -> Work:
        _, module, stacks = self._model.eager
        return self._eager(lambda inputs: module(inputs, self._ids, stacks))

    def masked(self) -> Work:
        module, _, stacks = self._model.eager
        return self._eager(lambda inputs: module(inputs, self._device_ids, stacks))

    def masked_compiled(self) -> Work:
        module, _, stacks = self._model.eager
        bound = BoundInputs(module, [self._device_ids], stacks)
        return self._eager(compile_module(bound, self.copies[0]))

    def peft(self) -> Work:
        model, names = self._model.peft, adapter_names(self._model.adapters)
        rows = [names[slot - 1] for slot in self.slots]
        pooling = self._model.base.module.pooling

        def run(inputs: dict[str, Tensor]) -> Tensor:
            y = take_output(model(**inputs, adapter_names=rows), self._model.task)
            return y if pooling is None else pooling(y, inputs["attention_mask"])

        return self._eager(run)

    def onnx(self, kind: str, captured: bool) -> Work:
        tokens = 0 if kind == "base" else self.shape.num_tokens
        graph, name = self._model.graph(kind, captured, tokens), self._model.outputs[0].name
        control = {"adapter_ids": self._device_ids}
        control = {key: value for key, value in control.items() if key in graph.inputs}
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
                feeds = {key: value[rows].contiguous() for key, value in inputs.items()}
                feeds["adapter_ids"] = torch.ones(len(rows), dtype=torch.int64).to(
                    self._lab.device.torch
                )
                for key, stack in self._model.stacks(tokens).items():
                    slot_rows, ahead = stack[by_name[key].rows(slot)], by_name[key].row_offset
                    feeds[key] = torch.cat([stack[:ahead], slot_rows]) if ahead else slot_rows
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
