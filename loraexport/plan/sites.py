"""Named sites, and those that get the very same tensor as slices of one layer."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import base_name
from loraexport_runtime.contract.manifest import Layer, Slice
from loraexport_runtime.errors import AdapterWeightsError

from ..errors import BaseModelError
from ..spec.schema import Spec

if TYPE_CHECKING:  # it imports torch
    from ..hf.skeleton import SiteShape, Skeleton


def named_sites(spec: Spec, sites: Collection[str], linear: Collection[str]) -> set[str]:
    """Where the spec's `sites` say that later adapters may apply; `linear`: what all-linear is."""
    if spec.sites == "all-linear":
        return set(linear)
    chosen: set[str] = set()
    for name in spec.sites or ():
        hits = [site for site in sites if site == name or site.endswith(f".{name}")]
        if not hits:
            raise BaseModelError(
                f"sites: {name!r} is no linear layer of this model; it has {len(sites)}, such as"
                f" {', '.join(list(sites)[:3])}"
            )
        chosen.update(hits)
    return chosen


def check_copies(headers: Iterable[AdapterHeader], skeleton: "Skeleton") -> None:
    """Hold the sizes of embeddings that adapters carry to the base's; a build compares the values.

    Raises:
        AdapterWeightsError: one has another size.
    """
    for header in headers:
        for module, (name, info) in header.base_copies.items():
            site = base_name(module, skeleton.sites, skeleton.naming)
            if site is None:
                continue
            shape = skeleton.sites[site]
            sizes = (shape.in_features, shape.out_features)
            expected = sizes if shape.kind == "embedding" or shape.is_conv1d else sizes[::-1]
            if info.shape != expected:
                raise AdapterWeightsError(
                    f"{header.path}: it carries the base weight {name!r} of {list(info.shape)}, and"
                    f" this base's is {list(expected)}: it was resized before the training. Resize"
                    " the base as well (model.resize_token_embeddings, then save_pretrained), and"
                    " build that"
                )


def share_inputs(
    skeleton: "Skeleton", lora: Collection[str], heads: Collection[str]
) -> list[tuple[str, ...]]:
    """The sites in the model's order; those that get the very same tensor together."""
    groups: dict[object, list[str]] = {}
    for site, shape in skeleton.sites.items():
        if site in lora or site in heads:
            alone = shape.input_id is None or site in heads
            groups.setdefault(site if alone else shape.input_id, []).append(site)
    return [tuple(group) for group in groups.values()]


def site_layer(
    widths: Mapping[str, int], in_features: int, kind: Literal["linear", "embedding"], max_rank: int
) -> Layer:
    """Sites of one input, side by side; `make_layer_plan` gives it strategy and stacks.

    Args:
        widths: the outputs of each site.
    """
    offsets = [0, *accumulate(widths.values())]
    return Layer(
        name=_group_name(list(widths)),
        kind=kind,
        in_features=in_features,
        out_features=offsets[-1],
        slices=tuple(
            Slice(site.rsplit(".", 1)[-1], site, offset, width)
            for (site, width), offset in zip(widths.items(), offsets, strict=False)
        ),
        max_rank=max_rank,
        strategy="masked",
        stacks=(),
        base_rows=None,
        in_base=True,
        labels=False,
        onnx=None,
        torchscript=None,
    )


def feature_roles(features: Collection[str], shape: "SiteShape") -> set[str]:
    """The parameters of a site that a slot has of its own, where adapters bring such features."""
    roles = {"output_scale"} if "dora" in features else set()
    if "bias" in features and shape.kind == "linear":
        roles.add("bias")
    return roles


def _group_name(group: Sequence[str]) -> str:
    """`…self.query+key+value` for sites of one parent."""
    parents = {site.rpartition(".")[0] for site in group}
    if len(parents) > 1 or len(group) == 1:
        return "+".join(group)
    parent = group[0].rpartition(".")[0]
    return f"{parent}.{'+'.join(site.rsplit('.', 1)[-1] for site in group)}".lstrip(".")
