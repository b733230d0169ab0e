"""A workload's decoder: its graphs as folders that engines open, and its models in torch."""

import json
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx_ir as ir

from loraexport_runtime.contract.genai_config import GENAI_CONFIG, read_genai_config
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ...bases.adapters import pack_adapters
from ...bases.decoder import (
    find_decoder_sites,
    load_decoder_base,
    load_decoder_graph,
    plain_directory,
)
from ...bases.genai_folder import adapt_config
from ...export.graft import base_rows, graft
from ...export.steps import write_steps
from ...graphs.files import save_grafted
from ...hf.model import model_class, no_progress_bar, read_task_config
from ...hf.quiet import quiet_models
from ...plan.decoder import DecoderPlan
from ...plan.plan import Plan, make_plan
from ...tensors import TORCH_DTYPES
from ..contest import Group
from ..work import CannotRun
from ..workloads.projects import Lab, adapter_names, model_spec
from ..workloads.schema import EngineWorkload, GenerationWorkload
from .bound_graph import BoundGraph, require_kernels
from .decoders import GenaiModel
from .eager import wrap_with_peft

Form = Literal["base", "mixed", "kernels"]
"""onnxruntime-genai's graph; with multi-LoRA grafted into it; its sites functions besides."""


class DecoderGraphs:
    """The graphs and models of some adapters of one rank, whatever the batch."""

    def __init__(
        self,
        workload: GenerationWorkload | EngineWorkload,
        lab: Lab,
        adapters: int,
        rank: int,
    ) -> None:
        self.lab, self.adapters, self.rank = lab, adapters, rank
        self.workload = workload
        self.plan = self._plan()
        self._built = load_decoder_graph(self.plan)
        self._place = lab.folder / f"graphs-{rank}-{adapters}"
        self._place.mkdir()
        self.folder = cache(self._folder)
        self.config: dict[str, Any] = read_genai_config(self.folder("mixed"))["model"]
        self.genai, self.graph = cache(self._genai), cache(self._graph)

    def _plan(self, kernels: bool = False) -> Plan[DecoderPlan]:
        export = {"tune": {"device": self.lab.device.kind}, "kernels": kernels}
        spec = model_spec(self.workload, self.lab, self.adapters, self.rank, **export)
        # `model_spec` writes kind causal_lm.
        return cast("Plan[DecoderPlan]", make_plan(spec, self.lab.folder))

    def _folder(self, form: Form) -> Path:
        """Written once: see Form.

        Raises:
            CannotRun: there are no kernels here.
        """
        self.library(form)
        folder, model = self._place / form, self._built.model.clone()
        self._built.write_files(folder)
        adapt_config(folder)
        self._set_threads(folder / GENAI_CONFIG)
        stacks = {} if form == "base" else self._graft(model, form == "kernels")
        save_grafted(model, folder / "model.onnx", stacks)
        write_steps(folder)
        return folder

    def _graft(self, model: ir.Model, kernels: bool) -> dict[str, np.ndarray]:
        """Put multi-LoRA into the graph, in place; the stacks of its slots."""
        plan, dtype = self._plan(kernels) if kernels else self.plan, self.lab.bench.dtype
        sites = find_decoder_sites(plan, model)
        base_weights, scales = load_decoder_base(plan)
        parameters = base_rows(sites, NUMPY_DTYPES[dtype])
        layers = [site.layer for site in sites]
        stacks = pack_adapters(plan, base_weights, layers, parameters, scales)
        found = graft(model, sites, stacks, plan.num_slots, dtype, kernels=kernels)
        assert found or not kernels, "linear sites of a decoder have functions"
        return stacks

    def library(self, form: Form) -> Path | None:
        """Of kernels, if it is a form for these. Raises CannotRun: there is none here."""
        if form != "kernels":
            return None
        return require_kernels(self.lab.device, self.lab.bench.dtype)

    def _set_threads(self, config: Path) -> None:
        threads = self.lab.device.threads
        if threads is not None:
            data = json.loads(config.read_text(encoding="utf-8"))
            data["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
            config.write_text(json.dumps(data), encoding="utf-8")

    def _genai(self, group: Group) -> GenaiModel:
        return GenaiModel(self.folder(group), self.lab.device)

    def _graph(self, form: Form, captured: bool) -> BoundGraph:
        place, library = self.folder(form) / "model.onnx", self.library(form)
        return BoundGraph(place, self.lab.device, captured, library)

    @cached_property
    def plain(self) -> Any:
        return self._load()

    def _load(self) -> Any:
        """transformers' model, in the workload's dtype.

        Raises:
            CannotRun: the graphs have other weights.
        """
        why = plain_directory(self.plan)
        if isinstance(why, str):
            raise CannotRun(why)
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
