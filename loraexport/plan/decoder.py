"""The sites of a decoder that generates. No weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.kinds import Tag

from ..spec.schema import Spec
from .graph import GraphPlan
from .layer import LayerPlan, make_layer_plan, refuse_features
from .sites import named_sites, share_inputs, site_layer
from .stacks import true_rows


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder: where it lies, and its graph, if it has one already."""

    tag: ClassVar[Tag] = "decoder"

    directory: Path
    graph: GraphPlan | None
    """None: onnxruntime-genai's builder makes it of the Hugging Face model."""


def plan_decoder(
    directory: Path,
    headers: Sequence[AdapterHeader],
    spec: Spec,
    num_slots: int,
    max_rank: int,
) -> tuple[tuple[LayerPlan, ...], DecoderPlan]:
    """Plan a decoder's sites: those that get one tensor are slices of one layer, all of them.

    The graph may hold such sites as one packed product (q, k, v), so that a layer has every slice
    even if adapters apply to some only.

    Raises:
        BaseModelError: the model cannot be built, or `sites` names none of its layers.
        AdapterConfigError: an adapter brings more than A and B of linear layers.
        AdapterWeightsError: an adapter has modules that the model lacks.
    """
    from ..hf.skeleton import read_skeleton

    skeleton = read_skeleton(directory, "causal-lm", spec.export.dtype)
    refuse_features(
        headers,
        "a decoder that generates (base.kind: causal_lm)",
        "retrain it without, or build a whole model (base.kind: transformers)",
    )
    linear = {site for site, shape in skeleton.sites.items() if shape.kind == "linear"}
    ranks = [
        {site: header.modules[module].rank for site, module in match_sites(header, linear).items()}
        for header in headers
    ]
    used = {site for rank in ranks for site in rank}
    lora = used if spec.sites is None else named_sites(spec, skeleton.sites, skeleton.inner_linear)
    plans = []
    for group in share_inputs(skeleton, linear, ()):
        if not lora & set(group):
            continue
        widths = {site: skeleton.sites[site].out_features for site in group}
        size_in = skeleton.sites[group[0]].in_features
        layer = site_layer(widths, size_in, "linear", max_rank)
        rows = true_rows(layer, ranks, spec)
        plans.append(make_layer_plan(layer, (), False, spec, num_slots, slot_rows=rows))
    return tuple(plans), DecoderPlan(directory, None)
