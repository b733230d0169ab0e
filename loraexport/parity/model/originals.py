"""The model that an adapter was trained on, as transformers has it, around or inside a plain one.

PEFT finds modules by their names in that model. So an adapter is loaded into it by its own names,
and not by those that the matching of sites has found: a wrong match shows as other numbers.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from loraexport_runtime.adapters.header import AdapterHeader

from ...errors import ParityError
from ...hf.model import read_whole_config
from ...hf.quiet import quiet_models


def find_original(model: Any, directory: Path, header: AdapterHeader) -> nn.Module:
    """A model that has every module of an adapter under its own name; it shares `model`'s modules.

    Raises:
        ParityError: no model of transformers has them, so PEFT cannot load this adapter.
    """
    names = {*header.modules, *header.saved}
    for original in _originals(model, directory):
        modules_by_name = dict(original.named_modules())
        if names <= modules_by_name.keys():
            return original
    raise ParityError(
        f"{header.path}: PEFT has nothing to compare with: no model of transformers around"
        f" {type(model).__name__}, or inside it, has modules such as {sorted(names)[0]!r}"
    )


def _originals(model: Any, directory: Path) -> Iterator[nn.Module]:
    """The model, the one inside it, and those of its module that hold it."""
    yield model
    inner = getattr(model, model.base_model_prefix, None)
    if isinstance(inner, nn.Module):
        yield inner
    whole = read_whole_config(directory)
    kinds: list[Any] = [
        value
        for value in vars(sys.modules[type(model).__module__]).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel)
    ]
    for config in (model.config, whole):
        for kind in kinds:
            if kind.config_class is type(config):
                around = _put_into(kind._from_config, config, model)
                if around is not None:
                    yield around
    around = _put_into(AutoModel.from_config, whole, model)
    if around is not None:
        yield around


def _put_into(make: Any, config: Any, model: nn.Module) -> nn.Module | None:
    """A model of a config with `model` in the place of its own part; None where it has none."""
    try:
        with torch.device("meta"), quiet_models():
            around: nn.Module = make(config)
    except Exception:  # not every class of a module can be made by itself
        return None
    paths = [name for name, part in around.named_modules() if name and type(part) is type(model)]
    if not paths:
        return None
    parent, _, child = paths[0].rpartition(".")
    setattr(around.get_submodule(parent), child, model)
    for module in around.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
            module.to_empty(device="cpu", recurse=False)
    return around
