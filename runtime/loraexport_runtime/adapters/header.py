"""A PEFT LoRA directory -> its sites, ranks and scalings (header only), then its tensors.

The one parser of PEFT adapters in this project: the exporter imports it from here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..contract.foreign import has_file
from ..errors import AdapterWeightsError, WeightsError
from .config import check_lora_config, trained_class
from .files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from .names import TensorNames
from .patterns import Scalings
from .selection import check_selection
from .tensor_files import FLOAT_DTYPES, TensorInfo, read_header_of

Feature = Literal["dora", "bias", "heads"]
"""What an adapter may bring beside A and B; a graph has a place for it, or not."""

NamedTensor = tuple[str, TensorInfo]


@dataclass(frozen=True)
class AdapterModule:
    """One module's pair: `scaling * B A`, A [rank, in], B [out, rank]."""

    rank: int
    in_features: int
    """For an embedding: the vocabulary's size."""
    out_features: int
    scaling: float
    """lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA; patterns applied."""
    is_embedding: bool
    a: NamedTensor = field(repr=False)
    b: NamedTensor = field(repr=False)
    magnitude: NamedTensor | None = field(repr=False)
    """DoRA's m [out]: the rows of W + scaling B A are scaled to these norms."""
    lora_bias: NamedTensor | None = field(repr=False)
    """[out], added to B's output before the scaling."""
    base_bias: NamedTensor | None = field(repr=False)
    """[out], trained in place of the base's own."""

    def tensors(self) -> list[NamedTensor]:
        every = (self.a, self.b, self.magnitude, self.lora_bias, self.base_bias)
        return [tensor for tensor in every if tensor is not None]


@dataclass(frozen=True)
class SavedModule:
    """A linear layer that was trained whole (modules_to_save): it replaces the base's."""

    in_features: int
    out_features: int
    weight: NamedTensor = field(repr=False)
    bias: NamedTensor | None = field(repr=False)

    def tensors(self) -> list[NamedTensor]:
        return [self.weight] + ([self.bias] if self.bias else [])


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter directory says before its tensors are read."""

    path: Path
    base_model: str | None
    rslora: bool
    modules: dict[str, AdapterModule]
    """By module name as PEFT saved it, without `base_model.model.`."""
    saved: dict[str, SavedModule]
    """By module name likewise."""
    modules_to_save: tuple[str, ...]
    """Ends of the names of modules that were trained whole, where the model had such."""
    base_copies: dict[str, NamedTensor] = field(repr=False)
    """Weights of the base that PEFT saves beside the LoRA, of embeddings, by module name."""
    files: AdapterFiles = field(repr=False, compare=False)
    """Where the tensors are read from, as the header was."""
    fan_in_fan_out: bool
    """Whether the weights of its base are stored [in, out]."""
    trained_class: str | None
    """The class of the model that it was trained on, with its module, where the config says it."""

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules.values())

    @property
    def has_peft_name(self) -> bool:
        """Whether its tensors have the name `default` in them; see names.py."""
        return any(".default" in name[-len(".default.weight") :] for name in self._factor_names())

    def _factor_names(self) -> Iterator[str]:
        return (name for module in self.modules.values() for name, _ in module.tensors())

    @property
    def features(self) -> tuple[Feature, ...]:
        """What it brings beside A and B."""
        modules = self.modules.values()
        uses: dict[Feature, bool] = {
            "dora": any(module.magnitude for module in modules),
            "bias": any(module.lora_bias or module.base_bias for module in modules),
            "heads": bool(self.saved),
        }
        return tuple(feature for feature, used in uses.items() if used)


def read_adapter(path: Path, *, at_rest: bool = False) -> AdapterHeader:
    """Read an adapter's config and the header of its safetensors file.

    The scaling of a module is `lora_alpha / r`, with rsLoRA `lora_alpha / sqrt(r)`; `alpha_pattern`
    and `rank_pattern` replace lora_alpha and r for the modules they match, first match in the
    file's order, by `(.*\\.)?(key)$`. Source: peft.tuners.lora.

    Args:
        at_rest: wait until nobody has written to the files for a moment; see AdapterFiles.

    Raises:
        AdapterConfigError: a field is unknown, unsupported or malformed.
        AdapterWeightsError: a tensor is unpaired, of an unknown role, or disagrees with the config.
        WeightsError: the weights file is missing, pickled or damaged.
        AdapterError: a file changed meanwhile.
    """
    files = AdapterFiles(path, at_rest=at_rest)
    config = check_lora_config(files)
    weights = path / WEIGHTS_FILE
    factors: dict[str, dict[str, NamedTensor]] = {}
    whole: dict[str, dict[str, NamedTensor]] = {}
    base_copies: dict[str, NamedTensor] = {}
    names = TensorNames(config["modules_to_save"], weights)
    for name, info in _read_infos(files).items():
        module, role = names.split(name, info.shape)
        if role == "base":
            _check_floats([(name, info)], weights)
            base_copies[module] = (name, info)
        else:
            kind = whole if role.startswith("saved") else factors
            parts = kind.setdefault(module, {})
            if role in parts:
                raise AdapterWeightsError(
                    f"{weights}: {parts[role][0]!r} and {name!r} are one and the same; remove one"
                )
            parts[role] = (name, info)
    if not factors:
        raise AdapterWeightsError(f"{weights}: holds no LoRA tensor at all")
    scalings = Scalings(config, path / CONFIG_FILE)
    modules = {
        name: _pair(name, parts, config, scalings, weights)
        for name, parts in sorted(factors.items())
    }
    check_selection(modules, config, weights)
    base_model = config.get("base_model_name_or_path")
    return AdapterHeader(
        path,
        base_model if isinstance(base_model, str) else None,
        bool(config["use_rslora"]),
        modules,
        {name: _saved(name, parts, weights) for name, parts in sorted(whole.items())},
        tuple(config["modules_to_save"]),
        base_copies,
        files,
        bool(config.get("fan_in_fan_out")),
        trained_class(config),
    )


def _read_infos(files: AdapterFiles) -> dict[str, TensorInfo]:
    weights, pickled = files.path / WEIGHTS_FILE, files.path / "adapter_model.bin"
    if not has_file(weights) and has_file(pickled):
        raise WeightsError(
            f"{pickled}: a .bin adapter is unpickled on load and can run code, so it is"
            ' refused. Convert it once, where torch is installed: python -c "import torch;'
            " from safetensors.torch import save_file;"
            f' save_file(torch.load({str(pickled)!r}, weights_only=True), {str(weights)!r})"'
        )
    with files.open(WEIGHTS_FILE) as opened:
        return read_header_of(opened, weights)


def _saved(module: str, parts: dict[str, NamedTensor], file: Path) -> SavedModule:
    where = f"{file}: module {module!r}, trained whole (modules_to_save),"
    weight, bias = parts.get("saved_weight"), parts.get("saved_bias")
    unknown = sorted(set(parts) - {"saved_weight", "saved_bias"})
    if weight is None or len(weight[1].shape) != 2 or unknown:
        kind = f"brings {unknown[0].removeprefix('saved_')!r}" if unknown else "is no linear layer"
        raise AdapterWeightsError(
            f"{where} {kind}; only linear layers can differ by row. Retrain without it, or merge"
            " this adapter into a base of its own"
        )
    _check_floats([part for part in (weight, bias) if part], file)
    out_features, in_features = weight[1].shape
    if bias is not None and bias[1].shape != (out_features,):
        raise AdapterWeightsError(
            f"{where} has a weight of shape {[out_features, in_features]} and a bias of"
            f" {list(bias[1].shape)}; expected [{out_features}], as of a torch.nn.Linear (a Conv1D"
            " stores [in, out], and cannot differ by row)"
        )
    return SavedModule(in_features, out_features, weight, bias)


def _pair(
    module: str,
    parts: dict[str, NamedTensor],
    config: dict[str, Any],
    scalings: Scalings,
    file: Path,
) -> AdapterModule:
    is_embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    extras = {role: parts.get(role) for role in ("magnitude", "lora_bias", "base_bias")}
    if set(parts) - set(extras) != set(names):
        missing = next((part for part in names if part not in parts), None)
        mixed = ", ".join(sorted(set(parts) - set(extras)))
        problem = f"lora_{missing} is missing" if missing else f"mixes {mixed}"
        raise AdapterWeightsError(f"{file}: module {module!r}: {problem}; a site needs its pair")
    a, b = parts[names[0]], parts[names[1]]
    _check_floats([a, b, *(extra for extra in extras.values() if extra)], file)
    shape_a, shape_b = a[1].shape, b[1].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise AdapterWeightsError(
            f"{file}: module {module!r}: A has shape {list(shape_a)} and B {list(shape_b)};"
            " expected [rank, in] and [out, rank]"
        )
    rank = scalings.rank(module)
    if shape_a[0] != rank:
        why = "config and weights are not of one training"
        if scalings.num_ranks(module) > 1:
            why = (
                "several keys of rank_pattern match it, and peft sorts them on save: put the one"
                " that the training used first"
            )
        raise AdapterWeightsError(
            f"{file}: module {module!r}: A has rank {shape_a[0]}, but the config gives r = {rank};"
            f" {why}"
        )
    scaling = scalings.scaling(module, rank)
    _check_extras(module, extras, config, shape_b[0], is_embedding, file)
    return AdapterModule(rank, shape_a[1], shape_b[0], scaling, is_embedding, a, b, **extras)


def _check_extras(
    module: str,
    extras: Mapping[str, NamedTensor | None],
    config: dict[str, Any],
    out_features: int,
    is_embedding: bool,
    file: Path,
) -> None:
    """Hold what stands beside A and B to the config, which says what has to be there."""
    where = f"{file}: module {module!r}"
    rules = {
        "magnitude": ("use_dora", config["use_dora"], config["use_dora"]),
        "lora_bias": ("lora_bias", config["lora_bias"], config["lora_bias"] and not is_embedding),
        # A layer without a bias has none to train.
        "base_bias": ("bias", config["bias"] == "lora_only", False),
    }
    for role, (key, allowed, required) in rules.items():
        tensor = extras[role]
        if (tensor is not None and not allowed) or (tensor is None and required):
            verb = "has" if tensor is not None else "lacks"
            raise AdapterWeightsError(
                f"{where} {verb} its {role}, but the config says {key} = {config[key]!r}; config"
                " and weights are not of one training"
            )
        if tensor is not None and tensor[1].shape != (out_features,):
            raise AdapterWeightsError(
                f"{where}: {tensor[0]!r} has shape {list(tensor[1].shape)}; expected"
                f" [{out_features}]"
            )


def _check_floats(tensors: Iterable[NamedTensor], file: Path) -> None:
    for name, info in tensors:
        if info.dtype not in FLOAT_DTYPES:
            raise AdapterWeightsError(
                f"{file}: tensor {name!r} is {info.dtype}; an adapter's weights are floats"
                f" ({', '.join(FLOAT_DTYPES)}): dequantize the adapter first"
            )
