"""The sites of a decoder that generates. No weight is read."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.kinds import Tag
from loraexport_runtime.contract.naming import Naming
from loraexport_runtime.errors import AdapterWeightsError

from ..errors import BaseModelError
from ..hf.checkpoint import read_float_weights
from ..spec.schema import Spec
from .graph import GraphPlan
from .layer import LayerPlan, make_layer_plan
from .sites import check_copies, feature_roles, named_sites, share_inputs, site_layer
from .stacks import LORA

if TYPE_CHECKING:  # it imports torch
    from ..hf.skeleton import Skeleton


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder: where it lies, and its graph, if it has one already."""

    tag: ClassVar[Tag] = "decoder"

    directory: Path
    graph: GraphPlan | None
    """None: onnxruntime-genai's builder makes it of the Hugging Face model."""
    naming: Naming
    missing: tuple[str, ...] = ()
    """As in ModelPlan."""


def plan_decoder(
    directory: Path,
    headers: Sequence[AdapterHeader],
    spec: Spec,
    num_slots: int,
    max_rank: int,
) -> tuple[tuple[LayerPlan, ...], DecoderPlan]:
    """Plan a decoder's sites: those that get one tensor are slices of one layer, all of them.

    The graph may hold such sites as one packed product (q, k, v), so that a layer has every slice
    even if adapters apply to some only. The first and the last layer, of the vocabulary, may be an
    adapter's own whole ones.

    Raises:
        BaseModelError: the model cannot be built, or `sites` names none of its layers.
        AdapterWeightsError: an adapter has modules that the model lacks, or brings whole ones that
            have no place.
    """
    from ..hf.generation import find_generation_config, find_templates
    from ..hf.model import require_weights
    from ..hf.names.stored_names import read_coverage
    from ..hf.skeleton import read_skeleton
    from ..hf.tokenizer import require_tokenizer

    skeleton = read_skeleton(directory, "causal-lm", spec.export.dtype)
    coverage = read_coverage(skeleton.model, read_float_weights(directory), directory)
    lists = coverage.required, coverage.unexpected
    require_weights(directory, "causal-lm", skeleton.model, *lists, ())
    require_tokenizer(directory)
    find_templates(directory)
    find_generation_config(directory)
    ends = _vocabulary_layers(skeleton)
    linear = {site for site, shape in skeleton.sites.items() if shape.kind == "linear"}
    lora, heads = _used_sites(headers, linear.union(ends), ends, skeleton)
    check_copies(headers, skeleton)
    if spec.sites is not None:
        lora = named_sites(spec, skeleton.sites, skeleton.inner_linear)
    features = set(spec.features or ()).union(*(header.features for header in headers))
    if "heads" in (spec.features or ()):
        heads.update(ends)
    if heads:
        _require_floats(spec, directory)
    plans = []
    for group in share_inputs(skeleton, linear.union(ends), heads):
        if not (lora | heads) & set(group):
            continue
        shape = skeleton.sites[group[0]]
        widths = {site: skeleton.sites[site].out_features for site in group}
        layer = site_layer(widths, shape.in_features, shape.kind, max_rank)
        roles = set(LORA) if lora & set(group) else set()
        if group[0] in heads:
            roles |= {"weight"} if shape.kind == "embedding" else {"weight", "bias"}
        else:
            roles |= feature_roles(features, shape)
        plans.append(make_layer_plan(layer, (), False, spec, num_slots, roles))
    return tuple(plans), DecoderPlan(directory, None, skeleton.naming, coverage.missing)


def _vocabulary_layers(skeleton: "Skeleton") -> tuple[str, ...]:
    """The table of the tokens, where LoRA may apply to it, and the output layer."""
    table = skeleton.model.get_input_embeddings()
    tables = [name for name, module in skeleton.model.named_modules() if module is table]
    return *(name for name in tables if name in skeleton.sites), *skeleton.head


def _used_sites(
    headers: Sequence[AdapterHeader],
    sites: Collection[str],
    ends: Collection[str],
    skeleton: "Skeleton",
) -> tuple[set[str], set[str]]:
    """The sites of the adapters' LoRA, and of the layers that they bring whole."""
    lora: set[str] = set()
    heads: set[str] = set()
    for header in headers:
        for site, module in match_sites(header, sites, skeleton.naming).items():
            if module in header.modules:
                lora.add(site)
            elif site in ends:
                heads.add(site)
            else:
                raise AdapterWeightsError(
                    f"{header.path}: it brings {module!r}, trained whole (modules_to_save); of a"
                    f" decoder only {' and '.join(ends)} can differ by row. Retrain it with LoRA"
                    " there, or merge it into a base of its own"
                )
    return lora, heads


def _require_floats(spec: Spec, directory: Path) -> None:
    """Raise BaseModelError for whole layers of a base in int4, which has none to begin with."""
    if spec.base.kind == "causal_lm" and spec.base.weights == "int4":
        raise BaseModelError(
            f"{directory}: adapters bring whole layers of their own (modules_to_save, features:"
            " heads), and with weights: int4 the base's are no floats that could stand beside"
            " them; build it with weights: float, or retrain the adapters with LoRA there"
        )
