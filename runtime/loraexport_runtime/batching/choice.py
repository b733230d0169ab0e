"""Which lengths go into one batch: those whose tokens are computed the fastest together."""

from bisect import bisect_left
from collections.abc import Sequence

LAUNCH = 64.0
"""What a batch costs beside its tokens, in tokens, until that is known."""
_MORE = 1.05
"""What a batch may cost for each token, over the cheapest, to end sooner."""
_NEEDED = 16
"""Batches of different sizes until it is."""
_DECAY = 0.98
"""Of what is known, by each batch: other work on the machine comes and goes."""


class BatchCost:
    """seconds(x) = a + b x of a batch of x tokens, its padding counted.

    a and b minimise the sum of (a / x + b - seconds / x)^2, each batch worth `_DECAY` of the next.
    """

    def __init__(self) -> None:
        self.launch = LAUNCH
        """a / b: what a batch costs beside its tokens, in tokens."""
        self._count = 0
        self._sums = [0.0] * 5

    def note(self, tokens: int, seconds: float) -> None:
        """A batch was run."""
        u, v = 1 / tokens, seconds / tokens
        values = (1.0, u, v, u * u, u * v)
        self._sums = [_DECAY * old + new for old, new in zip(self._sums, values, strict=True)]
        self._count += 1
        n, su, sv, suu, suv = self._sums
        spread = n * suu - su * su
        if self._count < _NEEDED or spread <= 1e-3 * n * suu:
            return  # too few, or too much alike
        a = (n * suv - su * sv) / spread
        b = (sv - a * su) / n
        if a <= 0:
            self.launch = 0.0
        elif b > 0:
            self.launch = a / b

    def choose(
        self, first: int, others: Sequence[int], most_rows: int, most_tokens: int
    ) -> tuple[int, int]:
        """The shortest and the longest length of a batch with a first request and some others.

        n requests of up to m tokens cost `launch` + n m for the sum of their own. Of all ranges of
        lengths around the first one, and of those that cost little more for each token than the
        cheapest, this is the one that ends the soonest: whoever comes next waits for it.
        """
        lengths = sorted(others)
        at = bisect_left(lengths, first)
        lengths.insert(at, first)
        found = [((self.launch + first) / first, first, first, first)]
        low_end = max(0, at - most_rows + 1)
        high_end = min(len(lengths), at + most_rows)
        own_below = 0
        for low in range(at, low_end - 1, -1):
            own_below += lengths[low]
            own = own_below - first
            for high in range(at, min(high_end, low + most_rows)):
                own += lengths[high]
                padded = (high - low + 1) * lengths[high]
                if padded > most_tokens:
                    break
                cost = (self.launch + padded) / own
                found.append((cost, padded, lengths[low], lengths[high]))
        most = _MORE * min(cost for cost, *_ in found)
        _, _, shortest, longest = min(
            (one for one in found if one[0] <= most), key=lambda one: one[1]
        )
        return shortest, longest
