"""A workload's decoder: its graphs as folders that engines open, and its models in torch."""

import json
import shutil
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from loraexport_runtime.contract.genai_config import GENAI_CONFIG, read_genai_config
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

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
from ..contest import Group
from ..workloads.projects import Lab, adapter_names, model_spec
from ..workloads.schema import EngineWorkload, GenerationWorkload
from .bound_graph import BoundGraph
from .decoders import GenaiModel
from .eager import wrap_with_peft


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
