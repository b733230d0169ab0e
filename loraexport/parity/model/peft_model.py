"""PEFT's own outputs for an artifact's adapters, to hold the graphs to.

Plain LoRA goes through PEFT's mixed batch (`adapter_names`). What PEFT cannot mix (DoRA, trained
biases, whole modules) or finds under other names than this model's has a model of its own, with one
adapter: not merged, which PEFT cannot do without a bias, and which would change tied weights too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from loraexport_runtime.adapters.config import read_lora_config
from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.checking.model import Inputs, RowCase
from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import AdapterEntry, Manifest

from ...hf.quiet import quiet_models
from ...hf.sentences.tail import Tail
from .originals import find_original
from .peft_patterns import require_bounded
from .plain_model import PlainModel


class PeftReference:
    """PEFT in float32: `run` gives what its rows should be; blends are not PEFT's."""

    def __init__(
        self, folder: Path, manifest: Manifest, model: Model, directory: Path, tail: Tail | None
    ) -> None:
        def load() -> PlainModel:
            return PlainModel(directory, manifest, model, {}, torch.float32, tail)

        self._plain = load()
        peft = put_adapters(self._plain.model, lambda: load().model, directory, folder, manifest)
        self._names = peft.names
        self._alone = {slot: self._plain.of(alone) for slot, alone in peft.alone.items()}
        self._plain = self._plain.of(peft.mixed)
        self._mixes: bool | None = None

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
        if not self._names:
            return self._plain(inputs)
        names = [self._names.get(slot, "__base__") for slot in slots]
        if len(set(names)) == 1 and names[0] != "__base__":  # one adapter alone
            self._plain.model.set_adapter(names[0])
            return self._plain(inputs)
        if self._mixes is None:
            self._mixes = self._gets_rows(inputs)
        return (
            self._plain(inputs, adapter_names=names)
            if self._mixes
            else self._run_each(inputs, names)
        )

    def _gets_rows(self, inputs: Inputs) -> bool:
        """Whether every adapted layer gets one tensor for each row; PEFT mixes no others."""
        from peft.tuners.lora import LoraLayer

        rows = len(next(iter(inputs.values())))
        sizes: set[int] = set()
        hooks = [
            module.register_forward_pre_hook(lambda _, arguments: sizes.add(len(arguments[0])))
            for module in self._plain.model.modules()
            if isinstance(module, LoraLayer) and isinstance(module, nn.Module)
        ]
        self._plain(inputs)
        for hook in hooks:
            hook.remove()
        return sizes <= {rows}

    def _run_each(self, inputs: Inputs, names: list[str]) -> np.ndarray:
        """The whole batch with every adapter, and of each the rows that name it."""
        with self._plain.model.disable_adapter():
            y = self._plain(inputs)
        for name in set(names) - {"__base__"}:
            self._plain.model.set_adapter(name)
            rows = np.array([other == name for other in names])
            y[rows] = self._plain(inputs)[rows]
        return y


@dataclass(frozen=True)
class PeftAdapters:
    """An artifact's adapters in PEFT."""

    mixed: Any
    """The base with those that PEFT has side by side, by name; the plain base where it has none."""
    names: dict[int, str]
    """Slot -> name, of those."""
    alone: dict[int, Any]
    """Slot -> a model with one adapter, of the others."""


def put_adapters(
    base: nn.Module,
    load: Callable[[], nn.Module],
    directory: Path,
    folder: Path,
    manifest: Manifest,
) -> PeftAdapters:
    """Give PEFT the adapters that start loaded, each by its own names.

    Args:
        base: which is changed.
        load: gives it anew.
        directory: where it lies.
        folder: the artifact's.

    Raises:
        ParityError: PEFT has no model with the modules of an adapter.
    """
    wrapped: Any = None
    names: dict[int, str] = {}
    alone: dict[int, Any] = {}
    for entry in manifest.adapters:
        if entry.slot is None:
            continue
        path = resolve(folder, entry.path)
        header = read_adapter(path)
        apart = header.features or header.has_peft_name or not _can_mix(base)
        if apart or not _same_names(header, base):
            alone[entry.slot] = load()
            _put_adapter(alone[entry.slot], directory, path, header, entry)
        else:
            wrapped = _add_adapter(wrapped, base, path, entry)
            names[entry.slot] = entry.name
    return PeftAdapters(base if wrapped is None else wrapped.eval(), names, alone)


def _can_mix(model: Any) -> bool:
    """DeBERTa's positions pass its projections too, and have no row for each adapter's name."""
    return bool(model.config.model_type != "deberta-v2")


def _same_names(header: AdapterHeader, model: nn.Module) -> bool:
    modules_by_name = dict(model.named_modules())
    return all(name in modules_by_name for name in (*header.modules, *header.saved))


def _add_adapter(wrapped: Any, base: nn.Module, path: Path, entry: AdapterEntry) -> Any:
    """The adapter beside those that PEFT already has."""
    from peft import PeftModel

    require_bounded(read_lora_config(path), dict(base.named_modules()), path)
    with quiet_models():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(base, str(path), adapter_name=entry.name)
        else:
            wrapped.load_adapter(str(path), adapter_name=entry.name)
    _scale(wrapped, entry, entry.name)
    return wrapped


def _put_adapter(
    model: nn.Module, directory: Path, path: Path, header: AdapterHeader, entry: AdapterEntry
) -> None:
    """Put one adapter beside a model's modules, in place."""
    from peft import PeftConfig, PeftModel

    name_for_peft = "default" if header.has_peft_name else entry.name
    original = find_original(model, directory, header)
    require_bounded(read_lora_config(path), dict(original.named_modules()), path)
    for name, saved in header.saved.items():
        # A head's width is the adapter's own.
        parent, _, child = name.rpartition(".")
        base_head: Any = original.get_submodule(name)
        is_linear = isinstance(base_head, nn.Linear)
        if is_linear and base_head.out_features != saved.out_features:
            head = nn.Linear(saved.in_features, saved.out_features, base_head.bias is not None)
            setattr(original.get_submodule(parent), child, head)
    config = PeftConfig.from_pretrained(str(path))
    config.task_type = None  # else PEFT asks the module for more than its sites
    with quiet_models():
        wrapped = PeftModel.from_pretrained(
            original,
            str(path),
            adapter_name=name_for_peft,
            config=config,
        )
        _scale(wrapped, entry, name_for_peft)
        wrapped.eval()


def _scale(wrapped: Any, entry: AdapterEntry, name: str) -> None:
    from peft.tuners.lora import LoraLayer

    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= entry.scale
