"""Contestants of `kind: generation`: the prefill of all prompts, and greedy steps after it.

Of a prefill the logits of the last tokens are compared, of the steps the first tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np

from loraexport_runtime.device.providers import normalise_providers

from ..contest import MIXED_KERNELS, Contest, Contestant, Group
from ..floors import site_floors
from ..results import Cell
from ..work import Work
from ..workloads.batches import draw_slots, rows_by_slot
from ..workloads.projects import Lab, adapter_names
from ..workloads.schema import GenerationWorkload
from .decoder_graphs import DecoderGraphs, Form
from .decoders import (
    DecodeRunner,
    EagerDecoder,
    GenaiDecoder,
    GroupedDecoder,
    PromptBatch,
)
from .plain_decoder import TorchDecoder
from .runtime_decoder import RuntimeDecoder

_COMPARED = 2
"""New tokens: the prefill's, and one of a step; the more, the likelier is a tie in one of them."""


def generation_contests(workload: GenerationWorkload, lab: Lab) -> Iterator[Contest]:
    """A contest for the prefill and one for the steps of every adapters, rank and rows."""
    for rank in workload.ranks:
        for adapters in workload.adapters:
            decoder = DecoderGraphs(workload, lab, adapters, rank)
            for rows in workload.rows:
                yield _Batch(decoder, workload, rows, "prefill").contest()
                yield _Batch(decoder, workload, rows, "decode").contest()


class _Batch:
    """The prompts of one batch, and who runs them."""

    def __init__(
        self,
        decoder: DecoderGraphs,
        workload: GenerationWorkload,
        rows: int,
        phase: Literal["prefill", "decode"],
    ) -> None:
        self._decoder, self._lab, self.phase = decoder, decoder.lab, phase
        self._workload, seed = workload, self._lab.bench.seed
        slots = draw_slots(workload.distribution, rows, decoder.adapters, seed)
        size = (rows, workload.prompt_tokens)
        # 0 is padding, and 1 and 2 start and end a text by default.
        ids = np.random.default_rng(seed).integers(3, decoder.config["vocab_size"], size)
        self._prompts = PromptBatch(ids, np.array(slots), workload.new_tokens)

    def contest(self) -> Contest:
        decoder, workload, rows = self._decoder, self._workload, self._prompts.rows
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
        ours = [*(() if prefill else ("mixed captured",)), "mixed GenAI", "mixed"]
        if self._lab.device.takes_kernels:
            first = MIXED_KERNELS if prefill else f"{MIXED_KERNELS} captured"
            ours = [first, *ours]
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
            (MIXED_KERNELS, "mixed", partial(self._plain, "kernels", False)),
            (f"{MIXED_KERNELS} captured", "mixed", partial(self._plain, "kernels", True)),
            ("base runtime", "base", partial(self._runtime, "base")),
            ("mixed runtime", "mixed", partial(self._runtime, "mixed")),
            (f"{MIXED_KERNELS} runtime", "mixed", partial(self._runtime, "kernels")),
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

    def _plain(self, form: Form, captured: bool) -> DecodeRunner:
        graph, config = self._decoder.graph(form, captured), self._decoder.config
        dtype = self._lab.bench.dtype
        return TorchDecoder(graph, config, self._prompts, self._lab.device, dtype)

    def _runtime(self, form: Form) -> DecodeRunner:
        decoder, device = self._decoder, self._lab.device
        providers = normalise_providers([self._lab.bench.device])
        adapters = 0 if form == "base" else decoder.adapters
        folder, library = decoder.folder(form), decoder.library(form)
        return RuntimeDecoder(folder, self._prompts, device, adapters, providers, library)

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
