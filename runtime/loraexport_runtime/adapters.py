"""A PEFT LoRA directory -> its sites, ranks and scalings (header only), then its tensors.

The one parser of PEFT adapters in this project: the exporter imports it from here.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import AdapterWeightsError, WeightsError
from .peft_config import CONFIG_FILE, WEIGHTS_FILE, matches, pattern_value, read_config
from .weights import FLOAT_DTYPES, TensorInfo, digest_array, read_header, read_tensors

_PREFIX = "base_model.model."


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
    a: tuple[str, TensorInfo] = field(repr=False)
    b: tuple[str, TensorInfo] = field(repr=False)


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter directory says before its tensors are read."""

    path: Path
    base_model: str | None
    rslora: bool
    modules: dict[str, AdapterModule]
    """By module name as PEFT saved it, without `base_model.model.`."""
    base_copies: dict[str, tuple[str, TensorInfo]] = field(repr=False)
    """Embedding weights that PEFT saves beside an embedding LoRA, by module name."""

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules.values())


@dataclass(frozen=True)
class LoraWeights:
    """The tensors of one module: A [rank, in], B [out, rank], as stored."""

    a: np.ndarray
    b: np.ndarray
    scaling: float


def read_adapter(path: Path) -> AdapterHeader:
    """Read an adapter's config and the header of its safetensors file.

    The scaling of a module is `lora_alpha / r`, with rsLoRA `lora_alpha / sqrt(r)`; `alpha_pattern`
    and `rank_pattern` replace lora_alpha and r for the modules they match, first match in the
    file's order, by `(.*\\.)?(key)$`. Source: peft.tuners.lora.

    Raises:
        AdapterConfigError: a field is unknown, unsupported or malformed.
        AdapterWeightsError: a tensor is unpaired, of an unknown role, or disagrees with the config.
        WeightsError: the weights file is missing, pickled or damaged.
    """
    config = read_config(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        pickled = path / "adapter_model.bin"
        if pickled.is_file():
            raise WeightsError(
                f"{pickled}: a .bin adapter is unpickled on load and can run code, so it is"
                ' refused. Convert it once, where torch is installed: python -c "import torch;'
                " from safetensors.torch import save_file;"
                f' save_file(torch.load({str(pickled)!r}, weights_only=True), {str(weights)!r})"'
            )
        raise WeightsError(
            f"{weights}: no such file; a PEFT adapter is a directory with {CONFIG_FILE} and"
            f" {WEIGHTS_FILE}"
        )
    factors: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    base_copies: dict[str, tuple[str, TensorInfo]] = {}
    for name, info in read_header(weights).items():
        module, role = _split_name(name, weights)
        if role == "base":
            base_copies[module] = (name, info)
        else:
            factors.setdefault(module, {})[role] = (name, info)
    if not factors:
        raise AdapterWeightsError(f"{weights}: holds no LoRA tensor at all")
    modules = {
        module: _pair(module, parts, config, weights) for module, parts in sorted(factors.items())
    }
    return AdapterHeader(
        path,
        config.get("base_model_name_or_path"),
        bool(config["use_rslora"]),
        modules,
        base_copies,
    )


def read_lora_weights(
    header: AdapterHeader, modules: Iterable[str] | None = None
) -> dict[str, LoraWeights]:
    """Read the tensors of some modules (default: all). Raises WeightsError on NaN or Inf."""
    chosen = {name: header.modules[name] for name in (modules or header.modules)}
    arrays = read_tensors(pair for module in chosen.values() for pair in (module.a, module.b))
    return {
        name: LoraWeights(arrays[module.a[0]], arrays[module.b[0]], module.scaling)
        for name, module in chosen.items()
    }


def match_sites(header: AdapterHeader, sites: Collection[str]) -> dict[str, str]:
    """Site -> module of the adapter that applies there.

    A module trained on `…ForCausalLM` carries one more leading name than the bare model, and the
    other way round: names are equal as they are, or after one leading name is dropped on one side,
    the same side for every module.

    Raises:
        AdapterWeightsError: a module has no site in this base.
    """
    best: dict[str, str] = {}
    for drop_module, drop_site in ((0, 0), (1, 0), (0, 1)):
        known: dict[str, list[str]] = {}
        for site in sites:
            known.setdefault(_drop(site, drop_site), []).append(site)
        hits = [
            (site, module)
            for module in header.modules
            for site in known.get(_drop(module, drop_module), ())
        ]
        found = dict(hits)
        if len(found) <= len(best):
            continue
        of_site = Counter(site for site, _ in hits)
        of_module = Counter(module for _, module in hits)
        twice = [hit for hit in hits if of_site[hit[0]] > 1 or of_module[hit[1]] > 1]
        if twice:
            (site, module), (other_site, other_module) = twice[:2]
            raise AdapterWeightsError(
                f"{header.path}: module {module!r} fits site {site!r} but for the first name, and"
                f" {other_module!r} fits {other_site!r}: it is not clear which belong together."
                " Name the spec's sites as the adapter names its modules"
            )
        best = found
    missing = sorted(set(header.modules) - set(best.values()))
    if missing:
        raise AdapterWeightsError(
            f"{header.path}: {len(missing)} of {len(header.modules)} modules have no site in this"
            f" base, first {missing[0]!r}. Sites here: {_some(sorted(sites))}."
            " Add the missing sites to the spec, or check that the adapter belongs to this base"
        )
    return best


def check_base_copies(
    header: AdapterHeader, matched: Mapping[str, str], base_weights: Mapping[str, str]
) -> None:
    """PEFT saves an embedding's own weight beside its LoRA: hold it to the base's digest.

    Raises:
        AdapterWeightsError: it differs, so the adapter was trained on another embedding.
    """
    site_of = {module: site for site, module in matched.items()}
    for module, (name, info) in header.base_copies.items():
        site = site_of.get(module)
        if site is None or base_weights[site] not in _digests(read_tensors([(name, info)])[name]):
            raise AdapterWeightsError(
                f"{header.path}: it carries the base weight {name!r}, which differs from the weight"
                " of this base: the adapter was trained on another embedding, or in a smaller"
                " dtype. If this is its base, save the adapter again with peft:"
                " model.save_pretrained(folder, save_embedding_layers=False)"
            )


def _digests(copy: np.ndarray) -> set[str]:
    """The digests of a copy in every dtype that holds its values exactly: training may widen."""
    digests = set()
    for name in FLOAT_DTYPES.values():
        with np.errstate(over="ignore"):
            cast = copy.astype(name)
        if np.array_equal(cast.astype(np.float64), copy.astype(np.float64)):
            digests.add(digest_array(cast))
    return digests


def digest_adapter(path: Path) -> str:
    """sha256 over the two files that define an adapter, as hexadecimal text."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update(hashlib.sha256((path / name).read_bytes()).digest())
    return digest.hexdigest()


def _split_name(name: str, file: Path) -> tuple[str, str]:
    """`base_model.model.X.lora_A.weight` -> (`X`, `A`)."""
    roles = {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_embedding_A": "embedding_A",
        ".lora_embedding_B": "embedding_B",
        ".base_layer.weight": "base",
    }
    for suffix, role in roles.items():
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return name[len(_PREFIX) : -len(suffix)], role
    raise AdapterWeightsError(
        f"{file}: tensor {name!r} is no LoRA factor of a linear or embedding layer, as"
        f" {_PREFIX}<module>.lora_A.weight would be. If it is a weight of the base that was not"
        " trained, save the adapter again with peft:"
        " model.save_pretrained(folder, save_embedding_layers=False)"
    )


def _pair(
    module: str, parts: dict[str, tuple[str, TensorInfo]], config: dict[str, Any], file: Path
) -> AdapterModule:
    is_embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    if set(parts) != set(names):
        missing = next((part for part in names if part not in parts), None)
        problem = f"lora_{missing} is missing" if missing else f"mixes {', '.join(sorted(parts))}"
        raise AdapterWeightsError(f"{file}: module {module!r}: {problem}; a site needs its pair")
    a, b = parts[names[0]], parts[names[1]]
    for name, info in (a, b):
        if info.dtype not in FLOAT_DTYPES:
            raise AdapterWeightsError(
                f"{file}: tensor {name!r} is {info.dtype}; LoRA factors are floats"
                f" ({', '.join(FLOAT_DTYPES)}): dequantize the adapter first"
            )
    shape_a, shape_b = a[1].shape, b[1].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise AdapterWeightsError(
            f"{file}: module {module!r}: A has shape {list(shape_a)} and B {list(shape_b)};"
            " expected [rank, in] and [out, rank]"
        )
    rank = pattern_value(config["rank_pattern"], module, config["r"])
    if shape_a[0] != rank:
        why = "config and weights are not of one training"
        if sum(matches(pattern, module) for pattern in config["rank_pattern"]) > 1:
            why = (
                "several keys of rank_pattern match it, and peft sorts them on save: put the one"
                " that the training used first"
            )
        raise AdapterWeightsError(
            f"{file}: module {module!r}: A has rank {shape_a[0]}, but the config gives r = {rank};"
            f" {why}"
        )
    alpha = pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return AdapterModule(rank, shape_a[1], shape_b[0], scaling, is_embedding, a, b)


def _drop(name: str, count: int) -> str:
    return name.split(".", count)[-1] if count else name


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
