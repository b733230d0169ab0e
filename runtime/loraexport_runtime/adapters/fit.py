"""Whether an adapter fits the artifact's layers: shapes, ranks, features."""

import math
from collections.abc import Mapping, Sequence

from ..contract.manifest import AdapterEntry, Layer, Slice
from ..errors import AdapterWeightsError, ArtifactError, quoted
from .header import AdapterHeader


def check_fit(header: AdapterHeader, sites: Mapping[str, str], layers: Sequence[Layer]) -> None:
    """Compare an adapter's shapes, ranks and features with the layers that have its sites.

    `sites` is site -> module, from `match_sites`. Raises AdapterWeightsError at the first site
    that differs.
    """
    for layer in layers:
        for part in layer.slices:
            if part.site in sites:
                _check_site(header, sites[part.site], layer, part)
        missing = [part.site for part in layer.slices if sites.get(part.site) not in header.saved]
        if not layer.in_base and missing:
            raise AdapterWeightsError(
                f"{header.path}: it brings no {missing[0]!r}, and the base has none of its own;"
                f" train it with modules_to_save=[{missing[0]!r}]"
            )
        _check_head(header, sites, layer)


def _check_head(header: AdapterHeader, sites: Mapping[str, str], layer: Layer) -> None:
    """Refuse an adapter that has lost a head: its config names one, and the file has none."""
    if layer.stack("weight") is None:
        return
    for part in layer.slices:
        is_named = f".{part.site}".endswith(tuple(f".{name}" for name in header.modules_to_save))
        if is_named and part.site not in sites:
            raise AdapterWeightsError(
                f"{header.path}: its config says modules_to_save ="
                f" {quoted(list(header.modules_to_save))}, but its weights lack {part.site!r};"
                " config and weights are not of one training, or the head was lost: save the"
                " adapter again with peft"
            )


def check_carried(entry: AdapterEntry, header: AdapterHeader, sites: Mapping[str, str]) -> None:
    """Hold the manifest's ranks, scalings and heads of a carried adapter to its own files.

    Raises:
        ArtifactError: they differ, so that the manifest says another scale than was proven.
    """
    modules = {site: header.modules.get(module) for site, module in sites.items()}
    ranks = {site: module.rank for site, module in modules.items() if module is not None}
    heads = {site for site, module in modules.items() if module is None}
    same = ranks == {site: part.rank for site, part in entry.sites.items()}
    same = same and heads == set(entry.heads)
    for site, part in entry.sites.items() if same else ():
        module = modules[site]
        scaling = module.scaling * entry.scale if module is not None else math.nan
        same = same and math.isclose(scaling, part.scaling, rel_tol=1e-12)
    if not same:
        raise ArtifactError(
            f"{header.path}: the manifest gives {entry.name!r} other sites, ranks, scalings or"
            " another scale than its files have; build the artifact again"
        )


def _check_site(header: AdapterHeader, name: str, layer: Layer, part: Slice) -> None:
    where = f"{header.path}: module {name!r}"
    saved = header.saved.get(name)
    if saved is not None:
        has_place = layer.stack("weight") is not None
        if layer.kind == "embedding":
            if not has_place:
                raise AdapterWeightsError(
                    f"{where} is an embedding that was trained whole, for which this artifact has"
                    " no place. Of a decoder add heads to features in the spec and build again;"
                    " else retrain it with LoRA on the embedding, or merge it into a base of its"
                    " own"
                )
            if (saved.out_features, saved.in_features) != (layer.in_features, part.width):
                raise AdapterWeightsError(
                    f"{where} has {saved.out_features} rows of {saved.in_features}, but site"
                    f" {part.site!r} has {layer.in_features} of {part.width}; the adapter belongs"
                    " to another base, or its vocabulary was resized: resize the base as well"
                    " (model.resize_token_embeddings, then save_pretrained), and build that"
                )
            return
        if not has_place:
            raise AdapterWeightsError(_missing_feature(where, "was trained whole", "heads"))
        # Narrower heads are padded; layers inside a head are as the base has them.
        narrower = layer.labels and saved.out_features < part.width
        fits = saved.out_features == part.width or narrower
        if saved.in_features != layer.in_features or not fits:
            raise AdapterWeightsError(
                f"{where} maps {saved.in_features} to {saved.out_features} features, but site"
                f" {part.site!r} maps {layer.in_features} to {part.width}; the adapter belongs to"
                " another base, or needs a build with an adapter whose head is as wide. Only labels"
                " may be fewer, and not where rows blend (export.blend)"
            )
        return
    module = header.modules[name]
    if module.is_embedding != (layer.kind == "embedding"):
        kind = "an embedding" if module.is_embedding else "a linear"
        raise AdapterWeightsError(
            f"{where} is {kind} LoRA, but layer {layer.name!r} is of kind {layer.kind};"
            f" the adapter belongs to {_other_base(header)}"
        )
    if (module.in_features, module.out_features) != (layer.in_features, part.width):
        raise AdapterWeightsError(
            f"{where} maps {module.in_features} to {module.out_features} features, but site"
            f" {part.site!r} maps {layer.in_features} to {part.width};"
            f" the adapter belongs to {_other_base(header)}"
            + (", or its head has fewer labels than another's here" if layer.labels else "")
        )
    if module.rank > layer.max_rank:
        raise AdapterWeightsError(
            f"{where} has rank {module.rank}, above max_rank {layer.max_rank};"
            f" set max_rank: {module.rank} in the spec and build again"
        )
    if layer.stack("lora_A") is None:
        raise AdapterWeightsError(
            f"{where} is LoRA, but site {part.site!r} has room for whole weights only; name it in"
            " the spec's sites and build again"
        )
    has_bias = module.lora_bias is not None or module.base_bias is not None
    if module.magnitude is not None and not _takes(layer, "output_scale"):
        raise AdapterWeightsError(_missing_feature(where, "uses DoRA", "dora"))
    if has_bias and layer.stack("bias") is None:
        raise AdapterWeightsError(_missing_feature(where, "brings a bias", "bias"))


def _other_base(header: AdapterHeader) -> str:
    config_says = f", and its config names {header.base_model!r}" if header.base_model else ""
    return f"another base{config_says}"


def _takes(layer: Layer, role: str) -> bool:
    """Whole weights hold a scale too: it is multiplied in."""
    return layer.stack(role) is not None or layer.stack("weight") is not None


def _missing_feature(where: str, brings: str, feature: str) -> str:
    return (
        f"{where} {brings}, for which this artifact has no place; add {feature} to features in the"
        " spec (of a whole model or a decoder) and build again"
    )
