"""Every kind has a recipe."""

from typing import get_args

from loraexport.pipeline.recipe import RECIPES
from loraexport.plan.plan import PlanKind
from loraexport_runtime.contract.kinds import Kind, Tag


def test_every_kind_of_a_plan_and_of_a_manifest_has_one() -> None:
    tags = list(get_args(Tag))
    assert [kind.tag for kind in get_args(Kind)] == tags
    assert [kind.tag for kind in get_args(PlanKind)] == tags
    assert list(RECIPES) == tags
