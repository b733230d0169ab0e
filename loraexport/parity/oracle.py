"""The float64 oracle: y[t] = W x[t] + b + scale * scaling * B (A x[t]), token by token.

It reads adapter_config.json and the tensors itself and shares no code with the adapter parser or
the strategies, so that a mistake in either shows. Slow, and meant to be.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
from safetensors import safe_open

from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import quoted

from ..errors import ParityError


@dataclass(frozen=True)
class ReferenceAdapter:
    """One adapter in float64, by site."""

    sites: dict[str, tuple[np.ndarray, np.ndarray, float]]
    """A [rank, in], B [out, rank], scaling times scale."""
    extras: dict[str, dict[str, np.ndarray]]
    """Beside A and B, each [out]: `magnitude` (DoRA), `lora_bias`, `base_bias`."""
    heads: dict[str, tuple[np.ndarray, np.ndarray | None]]
    """Whole layers: weight [out, in], bias [out]."""

    def rows(self, part: slice) -> "ReferenceAdapter":
        """The same of some outputs of every site."""
        return ReferenceAdapter(
            {site: (a, b[part], scaling) for site, (a, b, scaling) in self.sites.items()},
            {
                site: {name: values[part] for name, values in extras.items()}
                for site, extras in self.extras.items()
            },
            {
                site: (weight[part], None if bias is None else bias[part])
                for site, (weight, bias) in self.heads.items()
            },
        )

    def merge(
        self, site: str, weight: np.ndarray, bias: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The (W, b) with which a plain layer is this adapter's: W [out, in], b [out].

        V = W + s B A;  with DoRA W' = m V / ||V||, the norms over the inputs, else W' = V;
        b' = (the trained bias or b) + s b_B.
        """
        if site in self.heads:
            return self.heads[site]
        if site not in self.sites:
            return weight, bias
        a, b, scaling = self.sites[site]
        merged = weight + scaling * (b @ a)
        if "magnitude" in self.extras.get(site, {}):
            merged = merged * self.output_scale(site, weight)[:, None]
        return merged, self.merge_bias(site, bias)

    def output_scale(self, site: str, weight: np.ndarray) -> np.ndarray:
        """m / ||V|| of a site, [out]; 1 where the adapter uses no DoRA."""
        extras = self.extras.get(site, {})
        if "magnitude" not in extras:
            return np.ones(len(weight))
        a, b, scaling = self.sites[site]
        merged = weight + scaling * (b @ a)
        lengths: np.ndarray = np.sqrt((merged**2).sum(axis=1))
        return extras["magnitude"] / lengths

    def merge_bias(self, site: str, bias: np.ndarray | None) -> np.ndarray | None:
        """b' of a site, [out]; None where there is none."""
        extras = self.extras.get(site, {})
        bias = extras.get("base_bias", bias)
        if "lora_bias" in extras:
            shift = self.sites[site][2] * extras["lora_bias"]
            bias = shift if bias is None else bias + shift
        return bias


def read_reference_adapter(
    folder: Path, sites: Sequence[str], scale: float = 1.0
) -> ReferenceAdapter:
    """Read a PEFT directory for some sites, a module's name ending in a site's or the reverse."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    factors: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    extras: dict[str, dict[str, np.ndarray]] = {}
    heads: dict[str, dict[str, np.ndarray]] = {}
    roles = {
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.default": "magnitude",
        "lora_magnitude_vector.default.weight": "magnitude",
        "lora_B.default.bias": "lora_bias",
        "lora_magnitude_vector.weight": "magnitude",
        "lora_B.bias": "lora_bias",
        "base_layer.bias": "base_bias",
    }
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            key = name.removeprefix("base_model.model.")
            value = file.get_tensor(name).astype(np.float64)
            match = re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.default)?(\.weight)?", key)
            extra = next((end for end in roles if key.endswith("." + end)), None)
            if match:
                b = file.get_tensor(name.replace("lora_A", "lora_B").replace("_A", "_B"))
                scaling = scale * reference_scaling(config, match[1])
                factors[_find(match[1], sites)] = (value, b.astype(np.float64), scaling)
            elif extra:
                site = _find(key.removesuffix("." + extra), sites)
                extras.setdefault(site, {})[roles[extra]] = value
            elif "lora_" not in key and "base_layer" not in key:
                module, _, parameter = key.rpartition(".")
                if not _is_saved(module, config.get("modules_to_save") or ()):
                    continue  # an embedding of the base
                heads.setdefault(_find(module, sites), {})[parameter] = value
    whole = {site: (parts["weight"], parts.get("bias")) for site, parts in heads.items()}
    return ReferenceAdapter(factors, extras, whole)


def _is_saved(module: str, names: Sequence[str]) -> bool:
    """PEFT's rule for modules_to_save: the module, or one around it, has a name ending so."""
    parts = module.split(".")
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(name.endswith(tuple(names)) for name in around)


def reference_scaling(config: Mapping[str, object], module: str) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, after the patterns for a module."""
    rank, alpha = float(str(config.get("r", 8))), float(str(config.get("lora_alpha", 8)))
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        assert isinstance(patterns, dict), f"{field} is an object"
        hits = [value for key, value in patterns.items() if _names(key, module)]
        if hits and field == "rank_pattern":
            rank = float(hits[0])
        elif hits:
            alpha = float(hits[0])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def reference_output(
    x: np.ndarray,
    slots: np.ndarray,
    weights: Sequence[tuple[str, np.ndarray, np.ndarray | None]],
    adapters: Mapping[int, ReferenceAdapter],
) -> np.ndarray:
    """y float64 [T, out], the slices side by side.

    Args:
        x: [T, in], or ids int64 [T] for an embedding.
        slots: int64 [T], the slot of each token.
        weights: per slice (site, weight [out, in] or [vocabulary, dim], bias [out] or None).
        adapters: by slot; slot 0 has none.
    """
    is_embedding = x.ndim == 1
    if not is_embedding:
        weights = [(site, weight.astype(np.float64), bias) for site, weight, bias in weights]
    rows = []
    for token, slot in zip(x, slots.tolist(), strict=True):
        parts = []
        for site, weight, bias in weights:
            vector = None if is_embedding else token.astype(np.float64)
            part = weight[int(token)].astype(np.float64) if vector is None else weight @ vector
            if bias is not None:
                part = part + bias.astype(np.float64)
            if slot != 0 and site in adapters[slot].sites:
                a, b, scaling = adapters[slot].sites[site]
                hidden = a[:, int(token)] if vector is None else a @ vector
                part = part + scaling * (b @ hidden)
            parts.append(part)
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def _names(pattern: str, module: str) -> bool:
    """PEFT's rule: the pattern is the whole name, or what follows one of its dots."""
    starts = [0] + [i + 1 for i, letter in enumerate(module) if letter == "."]
    # By position, not by slicing: `^` stands for the start of the whole name only.
    compiled = regex.compile(pattern, regex.VERSION0)
    try:
        return any(compiled.fullmatch(module, start, timeout=1.0) for start in starts)
    except TimeoutError as error:
        raise ParityError(
            f"the pattern {quoted(pattern)} takes too long to match; name the modules instead"
        ) from error


def _find(module: str, sites: Sequence[str]) -> str:
    exact = [site for site in sites if site == module]
    close = [site for site in sites if module.endswith("." + site) or site.endswith("." + module)]
    return (exact or close)[0]


def read_adapters(folder: Path, manifest: Manifest) -> dict[int, ReferenceAdapter]:
    """The adapters that start loaded, as the oracle reads them, by slot."""
    sites = [part.site for layer in manifest.layers for part in layer.slices]
    return {
        entry.slot: read_reference_adapter(resolve(folder, entry.path), sites, entry.scale)
        for entry in manifest.adapters
        if entry.slot is not None
    }
