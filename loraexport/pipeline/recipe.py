"""Kind -> Recipe: how its artifacts are built, and how they are proven, then and later."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from loraexport_runtime.contract.kinds import Kind, Tag
from loraexport_runtime.contract.manifest import Manifest

from ..bases.weights import Base
from ..parity.report import Report
from ..plan.plan import Plan, PlanKind
from . import decoder, graph, layers, model
from .progress import Progress
from .subject import Subject


class Loaded(Protocol):
    """A base in memory, and what its kind makes graphs of."""

    @property
    def base(self) -> Base:
        """The weights at the sites, and the digest by which an artifact knows its base."""


PlanT = TypeVar("PlanT", bound=PlanKind)
LoadedT = TypeVar("LoadedT", bound=Loaded)
KindT = TypeVar("KindT", bound=Kind)


@dataclass(frozen=True)
class Recipe(Generic[PlanT, LoadedT, KindT]):
    """The three steps of a kind. A build takes all, a later proof leaves the export out."""

    load: Callable[[Plan[PlanT]], LoadedT]
    """Read the base and the adapters. Raises BaseModelError, WeightsError, AdapterError."""
    export: Callable[[LoadedT, Path, Progress], Manifest]
    """Write the graphs into a folder; gives all of its manifest but files and parity."""
    prove: Callable[[Subject[KindT], LoadedT | None], Report]
    """Hold every graph to the oracle; None: the base is not here, so to the stored cases."""


RECIPES: dict[Tag, Recipe[Any, Any, Any]] = {
    "layers": Recipe(layers.load, layers.export, layers.prove),
    "model": Recipe(model.load, model.export, model.prove),
    "decoder": Recipe(decoder.load, decoder.export, decoder.prove),
    "graph": Recipe(graph.load, graph.export, graph.prove),
}
