"""A random base and PEFT adapters for a workload, in a scratch folder, and the Spec over them.

Everything comes from seeds; nothing is downloaded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ...errors import UsageError
from ...hf.quiet import quiet_models
from ...spec.schema import Spec
from ...tensors import TORCH_DTYPES
from ..device import Device
from .schema import EngineWorkload, GenerationWorkload, LayersWorkload, ModelWorkload, Workloads


@dataclass(frozen=True)
class Lab:
    """Where a run works: a scratch folder of its own for a workload, and the device."""

    folder: Path
    device: Device
    bench: Workloads

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.bench.dtype]


def adapter_names(adapters: int) -> list[str]:
    """`a1` sits in slot 1."""
    return [f"a{slot}" for slot in range(1, adapters + 1)]


def layer_names(workload: LayersWorkload) -> list[str]:
    return [f"layer{index}" for index in range(workload.chain)]


def adapters_folder(ranks: Sequence[int]) -> str:
    """Of adapters that take these ranks in turn, in the scratch folder."""
    return f"rank{'-'.join(map(str, ranks))}"


def layers_spec(
    workload: LayersWorkload, lab: Lab, adapters: int, ranks: Sequence[int], **export: Any
) -> Spec:
    """The chain as layers with weights from a seed, and adapters written where they lack."""
    for slot, name in enumerate(adapter_names(adapters), 1):
        folder, rank = lab.folder / adapters_folder(ranks) / name, ranks[(slot - 1) % len(ranks)]
        if not folder.is_dir():
            _write_adapter(folder, workload, rank, [lab.bench.seed, rank, slot], lab)
    layers = [
        {
            "name": name,
            "type": "linear",
            "in_features": workload.in_features,
            "out_features": workload.out_features,
            "bias": True,
        }
        for name in layer_names(workload)
    ]
    base = {"kind": "layers", "init": {"seed": lab.bench.seed}, "layers": layers}
    return _spec(workload.name, base, adapters, ranks, {"dtype": lab.bench.dtype, **export})


def _write_adapter(
    folder: Path, workload: LayersWorkload, rank: int, seed: Sequence[int], lab: Lab
) -> None:
    """A and B that move y by about a third of its size: a chain of layers stays finite."""
    generator = np.random.default_rng(list(seed))
    size_in, size_out = workload.in_features, workload.out_features
    dtype = np.float32 if lab.bench.dtype == "bfloat16" else NUMPY_DTYPES[lab.bench.dtype]
    tensors = {}
    for name in layer_names(workload):
        a = generator.standard_normal((rank, size_in), np.float32) / np.sqrt(size_in)
        b = generator.standard_normal((size_out, rank), np.float32) * 0.3 / np.sqrt(rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.astype(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": layer_names(workload), "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def model_spec(
    workload: ModelWorkload | GenerationWorkload | EngineWorkload,
    lab: Lab,
    adapters: int,
    rank: int,
    **export: Any,
) -> Spec:
    """A directory with random weights, and adapters on all its linear layers.

    Raises:
        UsageError: peft is not installed.
    """
    _write_model(workload, lab, adapters, rank)
    base: dict[str, Any] = {"kind": "causal_lm", "path": "base"}
    if workload.kind == "model":
        base = {"kind": "transformers", "path": "base", "task": workload.task}
    elif workload.kind == "generation":
        base["weights"] = workload.weights
    return _spec(workload.name, base, adapters, [rank], {"dtype": lab.bench.dtype, **export})


def _spec(
    name: str, base: Any, adapters: int, ranks: Sequence[int], export: dict[str, Any]
) -> Spec:
    folder = adapters_folder(ranks)
    entries = [
        {"name": adapter, "path": f"{folder}/{adapter}"} for adapter in adapter_names(adapters)
    ]
    data = {"version": 1, "name": name, "base": base, "adapters": entries, "export": export}
    return Spec.model_validate_json(json.dumps(data))


def _write_model(
    workload: ModelWorkload | GenerationWorkload | EngineWorkload,
    lab: Lab,
    adapters: int,
    rank: int,
) -> None:
    import transformers

    from ...hf.model import model_class, no_progress_bar

    try:
        import peft
    except ImportError as error:
        raise UsageError(
            f"workload {workload.name!r} needs peft to make adapters; install 'loraexport[bench]'"
        ) from error
    folders = {
        slot: lab.folder / f"rank{rank}" / name
        for slot, name in enumerate(adapter_names(adapters), 1)
    }
    missing = {slot: folder for slot, folder in folders.items() if not folder.is_dir()}
    if not missing:
        return
    values = dict(workload.config)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    task = workload.task if workload.kind == "model" else "causal-lm"
    torch.manual_seed(lab.bench.seed)
    with lab.device.torch, quiet_models(), no_progress_bar():
        model: Any = model_class(config, task).from_config(config, dtype=lab.dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # 0 otherwise, and an exporter may leave that out
                torch.nn.init.normal_(parameter, std=0.02)
        if not (lab.folder / "base").is_dir():
            model.save_pretrained(lab.folder / "base")
            _write_tokenizer(lab.folder / "base")
        for slot, folder in missing.items():
            torch.manual_seed(lab.bench.seed + slot)
            lora = peft.LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules="all-linear",
                init_lora_weights=False,
                task_type=None if workload.kind == "model" else "CAUSAL_LM",
            )
            wrapped = peft.get_peft_model(model, lora)
            wrapped.save_pretrained(str(folder), save_embedding_layers=False)
            model = wrapped.unload()


def _write_tokenizer(folder: Path) -> None:
    """One token for each byte: onnxruntime-genai asks for a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer_class(tokenizer_object=tokenizer).save_pretrained(folder)
