"""The slots of what a row uses, held for as long as a request needs them."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from .batch import RowAdapters
from .table import HostAdapter

Content = tuple[Hashable, ...] | None
"""What an adapter is, whatever its name: its digest, and what multiplies its scaling; of a blend
these of each, and its weight. None: the base."""


@dataclass(frozen=True)
class RowUse:
    """What a row uses: one slot, of which 0 is the base, or the weights of several."""

    slot: int
    weights: tuple[tuple[int, float], ...] = ()
    """(slot, weight) of a row that blends, whose own slot is 0."""


BASE_USE = RowUse(0)


def use_of(
    row: RowAdapters, slots: Mapping[str, int], adapters: Mapping[str, HostAdapter]
) -> tuple[RowUse, Content]:
    """What a row uses, and what that is, whatever its adapters are called.

    Args:
        slots: of the adapters that it names.
        adapters: what each is that it may name.
    """

    def content(name: str) -> tuple[str, float]:
        return adapters[name].digest, adapters[name].scale

    if isinstance(row, str):
        return RowUse(slots[row]), content(row)
    weights = [(name, float(weight)) for name, weight in (row or {}).items() if weight]
    use = RowUse(0, tuple((slots[name], weight) for name, weight in weights))
    return use, tuple(sorted((*content(name), weight) for name, weight in weights)) or None


class Lease:
    """The slots of what a row uses, until they are released."""

    def __init__(self, use: RowUse, content: Content, give_back: Callable[[], None]) -> None:
        self.use = use
        self.content = content
        self._give_back = give_back

    @property
    def slot(self) -> int:
        """The one that it uses; 0 of the base, and of a blend."""
        return self.use.slot

    def release(self) -> None:
        """Give them back; once or more often."""
        self._give_back()
