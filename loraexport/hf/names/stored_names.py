"""Names in a checkpoint -> the names that transformers gives them when it loads the model, and
which of the model's weights are not among them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraexport_runtime.adapters.tensor_files import TensorInfo
from loraexport_runtime.contract.foreign import has_file, read_object

from ...errors import BaseModelError
from ..folder import foreign_code
from ..quiet import quiet_models
from .naming import KNOWN


@dataclass(frozen=True)
class Coverage:
    """How a checkpoint's tensors cover a model's weights; names as the model has them."""

    missing: tuple[str, ...]
    """Weights and buffers of which the files have nothing: transformers makes them up."""
    required: tuple[str, ...]
    """Those of them that the model's class does not let be missing."""
    unexpected: tuple[str, ...]
    """Tensors that the model has no place for, and that its class does not pass over."""


def read_coverage(model: Any, stored: Mapping[str, TensorInfo], directory: Path) -> Coverage:
    """What transformers would find in a checkpoint of these headers. No weight is read.

    Args:
        model: on the meta device; it stays there.

    Raises:
        BaseModelError: a tensor has another shape than config.json says.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    from ..model import key_mapping, no_progress_bar

    with (
        foreign_code(f"{directory}: transformers cannot load it"),
        quiet_models(),
        no_progress_bar(),
    ):
        tensors = {name: torch.empty(info.shape, device="meta") for name, info in stored.items()}
        mapping: Any = get_model_conversion_mapping(model, key_mapping(type(model)))
        options = LoadStateDictConfig(
            device_map={"": "meta"}, dtype=torch.float32, weight_mapping=mapping
        )
        seen, _ = convert_and_load_state_dict_in_model(model, tensors, options)
        model.tie_weights(missing_keys=seen.missing_keys, recompute_mapping=False)
        missing = sorted(seen.missing_keys)
        model._adjust_missing_and_unexpected_keys(seen)
    for name, shape, expected in sorted(seen.mismatched_keys):
        raise BaseModelError(
            f"{directory}: {name!r} has shape {list(shape)} in the checkpoint, and"
            f" {list(expected)} by config.json; the two are of different models: correct or"
            " download them again"
        )
    required, unexpected = sorted(seen.missing_keys), sorted(seen.unexpected_keys)
    return Coverage(tuple(missing), tuple(required), tuple(unexpected))


def loaded_names(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Stored name -> name in the model, of tensors that are loaded as they are stored.

    A directory without config.json, or of a model whose names stay, is read without torch.

    Raises:
        BaseModelError: config.json is broken.
    """
    config_file = directory / "config.json"
    names = list(names)
    if not has_file(config_file):
        return {name: name for name in names}
    config = read_object(config_file, BaseModelError)
    model = None if config.get("model_type") in KNOWN else _build(directory, config)
    if model is None:
        return {name: name for name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    loaded = {}
    for name in names:
        new, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, model.state_dict()
        )
        if converted is None:  # else it is cut or joined, and no tensor of the model's own
            loaded[name] = new
    return loaded


def _build(directory: Path, config: dict[str, Any]) -> Any:
    """The model that was saved, on the meta device; None where transformers has none."""
    import torch
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    try:
        read = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                make: Any = kind._from_config
                return make(read)
            make = transformers.AutoModel.from_config
            return make(read)
    except Exception:  # a type of model that transformers does not know, or cannot make
        return None
