"""A whole model's mixed graph in other forms, by which a workload shows what its parts cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ...plan.layer import LayerPlan, make_layer_plan
from ...plan.model import ModelPlan
from ...plan.plan import Plan
from ...plan.sites import site_layer
from ..contest import Contestant
from ..work import Work
from ..workloads.schema import Variant


def variant_contestants(
    variants: Sequence[Variant], onnx: Callable[[str, bool], Work]
) -> list[Contestant]:
    """Each variant as it is, and as a CUDA graph; `onnx(kind, captured)` makes the work."""
    return [
        Contestant(f"mixed {variant}{how}", "mixed", partial(onnx, variant, bool(how)))
        for variant in variants
        for how in ("", " captured")
    ]


def plan_variant(variant: str, make: Callable[..., Plan[ModelPlan]]) -> Plan[ModelPlan]:
    """Plan the same batch in another form.

    Args:
        make: gives the mixed graph's own plan, with other `features` or keys of `export`.
    """
    if variant == "features":
        return make(features=("dora", "bias"))
    if variant == "blend":
        return make(blend=True)
    plan = make()
    return replace(
        plan, layers=tuple(part for layer in plan.layers for part in _split(plan, layer))
    )


def _split(plan: Plan[ModelPlan], whole: LayerPlan) -> list[LayerPlan]:
    """Each site of a layer as a layer of its own, that shares no product."""
    layer = whole.layer
    if len(layer.slices) == 1:
        return [whole]
    roles = {stack.role for stack in layer.stacks}
    return [
        make_layer_plan(
            site_layer({part.site: part.width}, layer.in_features, layer.kind, layer.max_rank),
            (),
            False,
            plan.spec,
            plan.num_slots,
            roles,
        )
        for part in layer.slices
    ]
