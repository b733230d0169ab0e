"""A Hugging Face model -> how its adapters, and those of models around it, call its modules.

Of the models in `KNOWN` config.json is enough; of others transformers' classes say it.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import trained_architecture
from loraexport_runtime.contract.foreign import has_file, read_object
from loraexport_runtime.contract.naming import NO_NAMING, Naming
from loraexport_runtime.errors import AdapterWeightsError

from ...errors import BaseModelError

KNOWN = {
    "albert": "albert",
    "bert": "bert",
    "camembert": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "gpt2": "transformer",
    "gpt_neox": "gpt_neox",
    "llama": "model",
    "mistral": "model",
    "modernbert": "model",
    "mpnet": "mpnet",
    "phi3": "model",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
}
"""model_type -> the prefix of its models with heads. Their checkpoints name modules as they are."""
GENAI_TYPES = ("gemma", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Types in a genai_config.json that are transformers' own words for an architecture."""


def read_naming(
    directory: Path | None,
    sites: Iterable[str],
    headers: Iterable[AdapterHeader] = (),
    architecture: str | None = None,
) -> Naming:
    """The naming of a directory whose config.json says a type of model, and what its sites say.

    Args:
        sites: their names. A prefix of the `KNOWN` that stands before them, as a graph's exporter
            has put it there, is one that adapters of the bare model leave out.
        headers: of the build's adapters. Where nothing else says the architecture, theirs is it.
        architecture: what another file than config.json says.

    Raises:
        BaseModelError: config.json is broken.
        AdapterWeightsError: nothing says which architecture it is, and two adapters differ.
    """
    naming = NO_NAMING if directory is None else _naming_in(directory)
    if naming.architecture is None:
        naming = replace(naming, architecture=architecture or _trained_architecture(headers))
    leading = {site.partition(".")[0] for site in sites} & set(KNOWN.values())
    return replace(naming, prefixes=tuple(dict.fromkeys((*naming.prefixes, *sorted(leading)))))


def _trained_architecture(headers: Iterable[AdapterHeader]) -> str | None:
    """What adapters were trained on, as far as they say."""
    trained = {name: header for header in headers if (name := trained_architecture(header))}
    if len(trained) > 1:
        first, second, *_ = trained
        raise AdapterWeightsError(
            f"{trained[second].path}: it was trained on a model of {second!r}, and"
            f" {trained[first].path} on one of {first!r} (auto_mapping in their configs); one base"
            " is no two models, and this one does not say which it is: leave one of them out"
        )
    return next(iter(trained), None)


def _naming_in(directory: Path) -> Naming:
    if not has_file(directory / "config.json"):
        return NO_NAMING
    model_type = read_object(directory / "config.json", BaseModelError).get("model_type")
    if model_type in KNOWN:
        return Naming(model_type.replace("-", "_"), (KNOWN[model_type],), ())
    from transformers import AutoConfig, AutoModel

    mapping: Any = AutoModel._model_mapping
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        kind = mapping[type(config)]
    except Exception:  # a type that transformers does not know has no names that it could know
        return NO_NAMING
    kind = kind[0] if isinstance(kind, tuple) else kind
    return Naming(_architecture(kind), _prefixes(kind, type(config)), _other_parts(kind, config))


def naming_of(model: Any, whole: Any) -> Naming:
    """The naming of a model, on the meta device or not.

    Args:
        whole: the config of its directory, of which the model's own may be a part.
    """
    kind, config = type(model), model.config
    prefixes = _prefixes(kind, type(config))
    path = _path_in_whole(kind, whole)
    if path:
        around = (f"{prefix}.{path}" for prefix in _prefixes(kind, type(whole)))
        prefixes = (*prefixes, path, *around)
    return Naming(
        _architecture(kind), tuple(dict.fromkeys(prefixes)), _other_parts(kind, config, whole)
    )


def _path_in_whole(kind: type, whole: Any) -> str | None:
    """Where a part of a model stands in the whole, such as CLIP's vision tower."""
    import torch
    from transformers import AutoModel

    mapping: Any = AutoModel._model_mapping
    make: Any = AutoModel.from_config
    if type(whole) not in mapping or _is_headed(kind, type(whole)):
        return None
    try:
        with torch.device("meta"):
            model = make(whole)
    except Exception:  # its own code, on whatever values a config has
        return None
    paths = [name for name, module in model.named_modules() if name and type(module) is kind]
    return paths[0] if len(paths) == 1 else None


def _is_headed(kind: type, config: type) -> bool:
    """Whether a class is one that the Auto classes give for a config: a whole model, or headed."""
    from transformers.models.auto import auto_factory, modeling_auto

    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, auto_factory._LazyAutoMapping) and config in mapping:
            registered = mapping[config]
            if kind in (registered if isinstance(registered, tuple) else (registered,)):
                return True
    return False


def _classes(kind: type) -> list[Any]:
    """The models of a class's own module."""
    from transformers import PreTrainedModel

    return [
        value
        for value in vars(sys.modules[kind.__module__]).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == kind.__module__
    ]


def _prefixes(kind: type, config: type) -> tuple[str, ...]:
    """What stands before the bare model's modules in the classes that have such a config."""
    prefixes = (kin.base_model_prefix for kin in _classes(kind) if kin.config_class is config)
    return tuple(sorted({prefix for prefix in prefixes if prefix}))


def _other_parts(kind: type, *configs: Any) -> tuple[str, ...]:
    """The classes whose config is neither one of these nor one that has one of them inside."""
    types = {type(config) for config in configs}
    return tuple(
        sorted(
            kin.__name__
            for kin in _classes(kind)
            if kin.config_class is not None
            and kin.config_class not in types
            and not types & set((kin.config_class.sub_configs or {}).values())
        )
    )


def _architecture(kind: type) -> str | None:
    """`bert` of transformers.models.bert.modeling_bert."""
    parts = kind.__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] else None
