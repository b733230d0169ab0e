"""Contestants of `kind: generation`: the prefill of all prompts, and greedy steps after it.

Of a prefill the logits of the last tokens are compared, of the steps the first tokens.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from loraexport_runtime.contract.genai_config import GENAI_CONFIG, read_genai_config
from loraexport_runtime.device.dtypes import NUMPY_DTYPES
from loraexport_runtime.device.providers import normalise_providers

from ...bases.adapters import pack_adapters
from ...bases.decoder import find_decoder_sites, load_decoder_base, load_decoder_graph
from ...bases.genai_folder import adapt_config
from ...export.graft import base_rows, graft
from ...export.steps import write_steps
from ...graphs.files import save_grafted
from ...hf.model import model_class, no_progress_bar, read_task_config
from ...hf.quiet import quiet_models
from ...plan.decoder import DecoderPlan
from ...plan.plan import Plan, make_plan
from ...tensors import TORCH_DTYPES
from ..contest import Contest, Contestant, Group
from ..floors import site_floors
from ..results import Cell
from ..work import Work
from ..workloads.batches import draw_slots, rows_by_slot
from ..workloads.projects import Lab, adapter_names, model_spec
from ..workloads.schema import GenerationWorkload
from .bound_graph import BoundGraph
from .decoders import (
    DecodeRunner,
    EagerDecoder,
    GenaiDecoder,
    GenaiModel,
    GroupedDecoder,
    PromptBatch,
    RuntimeDecoder,
)
from .eager import wrap_with_peft
from .plain_decoder import TorchDecoder

_COMPARED = 2
"""New tokens: the prefill's, and one of a step; the more, the likelier is a tie in one of them."""


def generation_contests(workload: GenerationWorkload, lab: Lab) -> Iterator[Contest]:
    """A contest for the prefill and one for the steps of every adapters, rank and rows."""
    for rank in workload.ranks:
        for adapters in workload.adapters:
            decoder = _Decoder(workload, lab, adapters, rank)
            for rows in workload.rows:
                yield _Batch(decoder, rows, "prefill").contest()
                yield _Batch(decoder, rows, "decode").contest()


class _Decoder:
    """The graphs and models of some adapters of one rank, whatever the batch."""

    def __init__(self, workload: GenerationWorkload, lab: Lab, adapters: int, rank: int) -> None:
        self.workload, self.lab, self.adapters, self.rank = workload, lab, adapters, rank
        spec = model_spec(workload, lab, adapters, rank, tune={"device": lab.device.kind})
        # `model_spec` writes kind causal_lm.
        self.plan = cast("Plan[DecoderPlan]", make_plan(spec, lab.folder))
        self.folders = self._export(lab.folder / f"graphs-{rank}-{adapters}")
        self.config: dict[str, Any] = read_genai_config(self.folders["mixed"])["model"]
        self.genai, self.graph = cache(self._genai), cache(self._graph)

    def _export(self, folder: Path) -> dict[str, Path]:
        """onnxruntime-genai's graph as `base`, and with multi-LoRA grafted into it as `mixed`."""
        folders = {name: folder / name for name in ("base", "mixed")}
        base = load_decoder_graph(self.plan)
        model = base.model
        folder.mkdir()
        base.write_files(folders["mixed"])
        adapt_config(folders["mixed"])
        self._set_threads(folders["mixed"] / GENAI_CONFIG)
        shutil.copytree(folders["mixed"], folders["base"])
        save_grafted(model, folders["base"] / "model.onnx")
        sites = find_decoder_sites(self.plan, model)
        base_weights, scales = load_decoder_base(self.plan)
        parameters = base_rows(sites, NUMPY_DTYPES[self.lab.bench.dtype])
        layers = [site.layer for site in sites]
        stacks = pack_adapters(self.plan, base_weights, layers, parameters, scales)
        graft(model, sites, stacks, self.plan.num_slots, self.lab.bench.dtype)
        save_grafted(model, folders["mixed"] / "model.onnx", stacks)
        for written in folders.values():
            write_steps(written)
        return folders

    def _set_threads(self, config: Path) -> None:
        threads = self.lab.device.threads
        if threads is not None:
            data = json.loads(config.read_text(encoding="utf-8"))
            data["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
            config.write_text(json.dumps(data), encoding="utf-8")

    def _genai(self, group: Group) -> GenaiModel:
        return GenaiModel(self.folders[group], self.lab.device)

    def _graph(self, group: Group, captured: bool) -> BoundGraph:
        return BoundGraph(self.folders[group] / "model.onnx", self.lab.device, captured)

    @cached_property
    def plain(self) -> Any:
        return self._load()

    def _load(self) -> Any:
        """transformers' model, in the workload's dtype."""
        directory = self.plan.kind.directory
        config, dtype = read_task_config(directory, "causal-lm"), TORCH_DTYPES[self.lab.bench.dtype]
        with quiet_models(), no_progress_bar():
            model = model_class(config, "causal-lm").from_pretrained(directory, dtype=dtype)
        return model.to(self.lab.device.torch).eval()

    @cached_property
    def peft(self) -> Any:
        model = self._load()  # PEFT changes it in place
        folder = self.lab.folder / f"rank{self.rank}"
        return wrap_with_peft(model, folder, adapter_names(self.adapters))


class _Batch:
    """The prompts of one batch, and who runs them."""

    def __init__(self, decoder: _Decoder, rows: int, phase: Literal["prefill", "decode"]) -> None:
        self._decoder, self._lab, self.phase = decoder, decoder.lab, phase
        seed, workload = self._lab.bench.seed, decoder.workload
        slots = draw_slots(workload.distribution, rows, decoder.adapters, seed)
        size = (rows, workload.prompt_tokens)
        # 0 is padding, and 1 and 2 start and end a text by default.
        ids = np.random.default_rng(seed).integers(3, decoder.config["vocab_size"], size)
        self._prompts = PromptBatch(ids, np.array(slots), workload.new_tokens)

    def contest(self) -> Contest:
        decoder, workload, rows = self._decoder, self._decoder.workload, self._prompts.rows
        prefill = self.phase == "prefill"
        tokens = rows * (workload.prompt_tokens if prefill else 1)
        used = len(np.unique(self._prompts.slots))
        cell = Cell(
            workload=workload.name,
            kind="generation",
            phase=self.phase,
            unit="batch" if prefill else "step",
            adapters=decoder.adapters,
            used=used,
            rank=decoder.rank,
            rows=rows,
            tokens=tokens,
            floors=site_floors(decoder.plan, tokens, used, self._lab.device),
        )
        captured = () if prefill else ("mixed captured",)
        ours = (*captured, "mixed GenAI", "mixed")
        return Contest(cell, list(self._contestants()), ours, workload.leave_out)

    def _contestants(self) -> Iterator[Contestant]:
        ways: list[tuple[str, Group, Callable[[], DecodeRunner]]] = [
            ("base torch", "base", self._base_torch),
            ("base", "base", partial(self._plain, "base", False)),
            ("base captured", "base", partial(self._plain, "base", True)),
            ("base GenAI", "base", partial(self._genai, "base")),
            ("PEFT", "mixed", self._peft),
            ("one at a time", "mixed", self._one_at_a_time),
            ("mixed GenAI", "mixed", partial(self._genai, "mixed")),
            ("mixed", "mixed", partial(self._plain, "mixed", False)),
            ("mixed captured", "mixed", partial(self._plain, "mixed", True)),
            ("base runtime", "base", partial(self._runtime, "base")),
            ("mixed runtime", "mixed", partial(self._runtime, "mixed")),
        ]
        for name, group, make in ways:
            # Prompts differ in length, so that reading them is never captured.
            if self.phase == "decode" or not name.endswith(("captured", "runtime")):
                yield Contestant(name, group, partial(self._work, make))

    def _work(self, make: Callable[[], DecodeRunner]) -> Work:
        decoder = make()
        if self.phase == "prefill":
            return Work([decoder.prefill], decoder.logits, prepare=decoder.prepare)
        steps = self._prompts.new_tokens - 1
        steps = min(steps, decoder.most_steps or steps)
        return Work(
            calls=[lambda: decoder.decode(steps)],
            output=lambda: decoder.tokens(min(_COMPARED, 1 + steps)),
            units=steps,
            prepare=decoder.start_decode,
        )

    def _base_torch(self) -> DecodeRunner:
        return EagerDecoder(self._decoder.plain, self._prompts, self._lab.device)

    def _peft(self) -> DecodeRunner:
        """`adapter_names`, a name for each row."""
        names = adapter_names(self._decoder.adapters)
        rows = [names[slot - 1] for slot in self._prompts.slots]
        model, device = self._decoder.peft, self._lab.device
        return EagerDecoder(model, self._prompts, device, adapter_names=rows)

    def _plain(self, group: Group, captured: bool) -> DecodeRunner:
        graph, config = self._decoder.graph(group, captured), self._decoder.config
        dtype = self._lab.bench.dtype
        return TorchDecoder(graph, config, self._prompts, self._lab.device, dtype)

    def _runtime(self, group: Group) -> DecodeRunner:
        decoder = self._decoder
        providers = normalise_providers([self._lab.bench.device])
        adapters = decoder.adapters if group == "mixed" else 0
        folder = decoder.folders[group]
        return RuntimeDecoder(folder, self._prompts, self._lab.device, adapters, providers)

    def _genai(self, group: Group) -> DecodeRunner:
        return GenaiDecoder(self._decoder.genai(group), self._prompts, group == "mixed")

    def _one_at_a_time(self) -> DecodeRunner:
        """A batch of its own for each adapter, all on the mixed graph, step by step in turn.

        GenAI's own switching has one adapter's A and B in the graph, and ours reads those of all
        slots: a few percent of what a step reads.
        """
        groups = list(rows_by_slot(self._prompts.slots.tolist()).values())
        model = self._decoder.genai("mixed")
        decoders = [GenaiDecoder(model, self._prompts.of(rows), True) for rows in groups]
        return GroupedDecoder(decoders, groups)
