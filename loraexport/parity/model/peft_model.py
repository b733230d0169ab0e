"""PEFT's own outputs for an artifact's adapters, to hold the graphs to.

Plain LoRA goes through PEFT's mixed batch (`adapter_names`). What PEFT cannot mix (DoRA, trained
biases, whole modules) or finds under other names than this model's has a model of its own, with one
adapter: not merged, which PEFT cannot do without a bias, and which would change tied weights too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.checking.model import Inputs, RowCase
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import AdapterEntry, Manifest

from ...hf.quiet import quiet_models
from .plain_model import PlainModel


class PeftReference:
    """PEFT in float32: `run` gives what its rows should be; blends are not PEFT's."""

    def __init__(self, folder: Path, manifest: Manifest, model: Model, directory: Path) -> None:
        self._plain = PlainModel(directory, manifest, model, {}, torch.float32)
        self._names: dict[int, str] = {}
        self._alone: dict[int, PlainModel] = {}
        base = self._plain.model
        wrapped: Any = None
        for entry in manifest.adapters:
            if entry.slot is None:
                continue
            path = resolve(folder, entry.path)
            header = read_adapter(path)
            if header.features or not _same_names(header, base):
                alone = PlainModel(directory, manifest, model, {}, torch.float32)
                _put_adapter(alone.model, path, header, entry)
                self._alone[entry.slot] = alone
            else:
                wrapped = add_adapter(wrapped, base, path, entry)
                self._names[entry.slot] = entry.name
        self._plain.model = base if wrapped is None else wrapped.eval()
        self._is_wrapped = wrapped is not None

    def run(self, inputs: Inputs, case: RowCase) -> np.ndarray:
        """The output for a case's rows; the base's for rows that blend."""
        slots = case.adapter_ids.tolist()
        y = self._run_mixed(inputs, slots)
        for slot, model in self._alone.items():
            rows = np.array(slots) == slot
            if rows.any():
                y[rows] = model(inputs)[rows]
        return y

    def _run_mixed(self, inputs: Inputs, slots: list[int]) -> np.ndarray:
        if not self._is_wrapped:
            return self._plain(inputs)
        names = [self._names.get(slot, "__base__") for slot in slots]
        if len(set(names)) == 1 and names[0] != "__base__":  # one adapter alone
            self._plain.model.set_adapter(names[0])
            return self._plain(inputs)
        return self._plain(inputs, adapter_names=names)


def _same_names(header: AdapterHeader, model: nn.Module) -> bool:
    known = dict(model.named_modules())
    return all(name in known for name in (*header.modules, *header.saved))


def add_adapter(wrapped: Any, base: nn.Module, path: Path, entry: AdapterEntry) -> Any:
    """The adapter beside those that PEFT already has."""
    from peft import PeftModel

    with quiet_models():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(base, str(path), adapter_name=entry.name)
        else:
            wrapped.load_adapter(str(path), adapter_name=entry.name)
    _scale(wrapped, entry)
    return wrapped


def _put_adapter(model: nn.Module, path: Path, header: AdapterHeader, entry: AdapterEntry) -> None:
    """Put one adapter beside a model's modules, in place."""
    from peft import PeftConfig, PeftModel

    for name, saved in header.saved.items():
        # A head's width is the adapter's own.
        parent, _, child = name.rpartition(".")
        own: Any = model.get_submodule(name)
        if own.out_features != saved.out_features:
            head = nn.Linear(saved.in_features, saved.out_features, own.bias is not None)
            setattr(model.get_submodule(parent), child, head)
    config = PeftConfig.from_pretrained(str(path))
    config.task_type = None  # else PEFT asks the module for more than its sites
    with quiet_models():
        wrapped = PeftModel.from_pretrained(
            _holder(model, header),
            str(path),
            adapter_name=entry.name,
            config=config,
        )
        _scale(wrapped, entry)
        wrapped.eval()


def _holder(model: nn.Module, header: AdapterHeader) -> nn.Module:
    """The module in which the adapter's names are those of its training.

    An adapter of `…ForCausalLM` has one more leading name than the bare model, or the reverse.
    """
    known = dict(model.named_modules())
    matched = match_sites(header, list(known))
    site, module = next(iter(matched.items()))
    if site == module:
        return model
    if module.endswith(f".{site}"):
        holder = nn.Module()
        setattr(holder, module.removesuffix(f".{site}"), model)
        return holder
    return known[site.removesuffix(f".{module}")]


def _scale(wrapped: Any, entry: AdapterEntry) -> None:
    from peft.tuners.lora import LoraLayer

    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and entry.name in module.scaling:
            module.scaling[entry.name] *= entry.scale
