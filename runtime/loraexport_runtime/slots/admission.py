"""Requests that wait for their turn: bounded, fair between tenants, and none is overtaken for ever.

Deficit round robin (Shreedhar and Varghese, 1995): the tenants take turns, and each turn is worth
the same number of tokens, so that a tenant of many or long requests delays itself alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..errors import InputError, QueueFullError

T = TypeVar("T")
V = TypeVar("V")
QUANTUM = 512
"""Tokens of a turn."""
PATIENCE = 64
"""So many others may be admitted while an item is kept from a slot; then it goes first."""
SHARE = 8
"""A tenant may have so many times as much waiting as there is room left (Choudhury and Hahne's
dynamic threshold, 1998): however many flood the queue, there is room for who comes next."""


@dataclass(eq=False)
class _Item(Generic[T]):
    value: T
    cost: int
    tenant: str | None
    resource: Hashable
    passed: int = 0
    """How many were admitted since it first was kept from a slot."""


@dataclass(eq=False)
class _Tenant(Generic[T]):
    items: deque[_Item[T]] = field(default_factory=deque)
    tokens: int = 0
    """Of all its items."""
    deficit: int = 0
    """Tokens that it may still take in this turn."""


class AdmissionQueue(Generic[T]):
    """What waits, by tenant. Safe to use from threads; one of them takes and removes."""

    def __init__(self, most_items: int, most_tokens: int) -> None:
        """The bounds on what waits at the same time."""
        for name, bound in (("requests", most_items), ("tokens", most_tokens)):
            if not isinstance(bound, int) or isinstance(bound, bool) or bound < 1:
                raise InputError(f"at most {bound!r} queued {name}; expected a number from 1 on")
        self.most_items, self.most_tokens = most_items, most_tokens
        self._lock = threading.Lock()
        self._tenants: dict[str | None, _Tenant[T]] = {}
        self._turns: deque[str | None] = deque()
        """Tenants with items; first stands whose turn it is, or was."""
        self._blocked: dict[_Item[T], None] = {}
        """Those that were kept from a slot, few of all that wait."""
        self._num_items = self._num_tokens = 0

    def sizes(self) -> tuple[int, int]:
        """How many wait, and their tokens, all together."""
        with self._lock:
            return self._num_items, self._num_tokens

    def values(self, of: Callable[[T], V]) -> list[V]:
        """Something of each that waits."""
        with self._lock:
            tenants = self._tenants.values()
            return [of(item.value) for tenant in tenants for item in tenant.items]

    def put(
        self, values: list[T], cost: int, tenant: str | None, resource: Hashable = None
    ) -> None:
        """Let some wait, all or none of them.

        Args:
            cost: of each, in tokens.
            resource: what they need: where one is refused it, so are all others.

        Raises:
            QueueFullError: they are more than the bounds allow, or than `SHARE` does.
        """
        tokens = cost * len(values)
        with self._lock:
            own = self._require_room(len(values), tokens, tenant)
            if tenant not in self._tenants:
                self._tenants[tenant] = own
                self._turns.append(tenant)
            own.items.extend(_Item(value, cost, tenant, resource) for value in values)
            own.tokens += tokens
            self._num_items += len(values)
            self._num_tokens += tokens

    def require_room(self, num: int, tokens: int, tenant: str | None) -> None:
        """Raise QueueFullError where `put` would, for so many with so many tokens together."""
        with self._lock:
            self._require_room(num, tokens, tenant)

    def take(
        self,
        attempt: Callable[[T, bool, bool], bool],
        among: Callable[[Hashable], bool] | None = None,
    ) -> T | None:
        """The next one that can be admitted, or None.

        What is kept from a slot does not keep those behind it; once `PATIENCE` others were
        admitted since, it goes first, and nobody takes a slot from others any more until it has
        one.

        Args:
            attempt: (value, may_page, is_aged) -> whether it is admitted; called without a lock,
                until it says so. may_page: it may take a slot from another adapter; is_aged: what
                it waits for is to be kept for it.
            among: of a resource: whether those that need it are looked at; None: all are. Whoever
                is taken so ends nobody's turn, and pays with its own turns to come.
        """
        may_page = True
        refused: set[Hashable] = set()
        for item in self._aged():
            if item.resource in refused or not (among is None or among(item.resource)):
                continue
            if attempt(item.value, may_page, True):
                return self._admit(item, 0)
            refused.add(item.resource)
            may_page = False
        while (turn := self._next(refused, among)) is not None:
            item, rounds = turn
            if attempt(item.value, may_page, False):
                return self._admit(item, rounds if among is None else 0)
            refused.add(item.resource)
            with self._lock:
                self._blocked[item] = None
        return None

    def remove(self, is_over: Callable[[T], bool]) -> list[T]:
        """Take out those of which this is true."""
        removed = []
        with self._lock:
            for name in list(self._turns):
                items = self._tenants[name].items
                over = [item for item in items if is_over(item.value)]
                for item in over:
                    self._drop(item)
                removed += [item.value for item in over]
        return removed

    def _require_room(self, num: int, tokens: int, tenant: str | None) -> _Tenant[T]:
        """The tenant, or a new one that is not in line yet."""
        if self._num_items + num > self.most_items:
            raise QueueFullError(
                f"{self._num_items} requests wait, and {self.most_items} may; try again later"
            )
        if self._num_tokens + tokens > self.most_tokens:
            raise QueueFullError(
                f"the requests that wait have {self._num_tokens} tokens, and with {tokens} more"
                f" they had more than {self.most_tokens}; try again later"
            )
        own: _Tenant[T] = self._tenants.get(tenant) or _Tenant()
        for what, waiting, more, room in (
            ("requests", len(own.items), num, self.most_items - self._num_items),
            ("tokens", own.tokens, tokens, self.most_tokens - self._num_tokens),
        ):
            if waiting + more > SHARE * room:
                raise QueueFullError(
                    f"{waiting} {what} of {tenant or 'this tenant'} wait, and room for {room} is"
                    " kept for others; try again later"
                )
        return own

    def _aged(self) -> list[_Item[T]]:
        with self._lock:
            aged = [item for item in self._blocked if item.passed >= PATIENCE]
            return sorted(aged, key=lambda item: (-item.passed, self._turns.index(item.tenant)))

    def _next(
        self, refused: set[Hashable], among: Callable[[Hashable], bool] | None
    ) -> tuple[_Item[T], int] | None:
        """The item whose turn it is, and how many rounds of turns come before it."""

        def is_open(item: _Item[T]) -> bool:
            return item.resource not in refused and (among is None or among(item.resource))

        with self._lock:
            heads = []
            for place, name in enumerate(self._turns):
                tenant = self._tenants[name]
                item = next(filter(is_open, tenant.items), None)
                if item is None:
                    continue
                if place == 0 and tenant.deficit >= item.cost:
                    return item, 0  # its turn goes on
                rounds = max(1, -(-(item.cost - tenant.deficit) // QUANTUM))
                heads.append((rounds, place or len(self._turns), item))
            if not heads:
                return None
            rounds, _, item = min(heads, key=lambda head: head[:2])
            return item, rounds

    def _admit(self, item: _Item[T], rounds: int) -> T:
        """Note that an item is served, after so many rounds in which nobody could pay."""
        with self._lock:
            if rounds:
                self._turns.rotate(-1)  # the turn of the first is over
                place = self._turns.index(item.tenant)
                for at, other in enumerate(self._turns):
                    # Who stands behind it has not had the last of these turns yet.
                    self._tenants[other].deficit += QUANTUM * (rounds - (at > place))
                self._turns.rotate(-place)
            self._tenants[item.tenant].deficit -= item.cost  # below 0 for one that was aged
            self._drop(item)
            for waiting in self._blocked:
                waiting.passed += 1
            return item.value

    def _drop(self, item: _Item[T]) -> None:
        name = item.tenant
        tenant = self._tenants[name]
        tenant.items.remove(item)
        self._blocked.pop(item, None)
        self._num_items -= 1
        self._num_tokens -= item.cost
        tenant.tokens -= item.cost
        if not tenant.items:  # what it may still take is not kept for later
            del self._tenants[name]
            is_first = self._turns[0] == name
            self._turns.remove(name)
            self._turns.rotate(is_first)  # so that the next one's turn does not count as over
