"""What a request asks of the choice of its tokens, and the choice: logits -> the next token.

Penalties and biases change the logits; a grammar, `min_tokens` and what is suppressed, repeated or
a bad word forbid some; then temperature, top_k, top_p and min_p, in this order, leave the tokens of
which one is drawn.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import InputError
from .bans import Bans


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token always."""
    top_k: int = 50
    """Of so many of the likeliest; 0: of all."""
    top_p: float = 1.0
    """Of the fewest of these that have this share of their probability."""
    min_p: float = 0.0
    """Of those that have this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of the tokens of prompt and answer, and multiplies the others."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token of the answer."""
    frequency_penalty: float = 0.0
    """Taken from it as often as the answer has the token."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of tokens."""
    suppress_tokens: Sequence[int] = ()
    """None of these comes."""
    no_repeat_ngram_size: int = 0
    """So many tokens in a row do not come that prompt and answer have already; 0: any may."""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """None of these comes whole, but for a word of one token that ends the answer."""
    seed: int | None = None
    """The same one draws the same tokens; default: others each time."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= 0 or self.top_k == 1

    @property
    def changes_logits(self) -> bool:
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
        )


class Allowed(Protocol):
    """What says which tokens may come next: a grammar."""

    def mask(self) -> np.ndarray:
        """bool [vocabulary]: those that may."""

    def accept(self, token: int) -> bool:
        """Go on from a token; whether the text may end only now."""

    def copy(self) -> "Allowed":
        """The same for another answer."""


class Sampler:
    """The choice of one answer's tokens, one after the other."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] | np.ndarray,
        index: int = 0,
        ends: Collection[int] = (),
        min_tokens: int = 0,
        allowed: Allowed | None = None,
    ) -> None:
        """
        Args:
            index: of the answer, of several of one request.
            ends: tokens that end it, which do not come before there are `min_tokens`.
        """
        self.sampling = sampling
        self._random: np.random.Generator | None = None
        if not sampling.is_greedy:
            seed = None if sampling.seed is None else [sampling.seed, index]
            self._random = np.random.default_rng(seed)
        self._counts: Counter[int] = Counter()
        self._seen = {int(token) for token in prompt} if sampling.repetition_penalty != 1 else set()
        self._ends = np.array(sorted(set(ends)), dtype=np.int64)
        self._min_tokens = min_tokens if len(self._ends) else 0
        self._bans = Bans(
            sampling.suppress_tokens,
            sampling.bad_words_ids,
            sampling.no_repeat_ngram_size,
            prompt,
            ends,
        )
        self._allowed = allowed
        self._num = 0

    @property
    def changes_logits(self) -> bool:
        """Whether the logits alone do not say what is likely."""
        return self.sampling.changes_logits or self._restricts

    @property
    def _restricts(self) -> bool:
        is_early = self._num < self._min_tokens
        return is_early or self._allowed is not None or self._bans.are_any

    @property
    def takes_likeliest(self) -> bool:
        """Whether it is the likeliest token that comes next, as the graph itself tells it."""
        return self.sampling.is_greedy and not self.changes_logits

    def num_candidates(self, vocabulary: int) -> int:
        """How many of the likeliest tokens `draw` has to see."""
        if self.sampling.is_greedy:
            return 1
        return min(self.sampling.top_k or vocabulary, vocabulary)

    def uniform(self) -> float:
        """The next number by chance, from 0 to below 1."""
        return 0.0 if self._random is None else float(self._random.random())

    def note(self, token: int) -> bool:
        """A token was chosen; whether the grammar ends here."""
        self._num += 1
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._counts[token] += 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)
        self._bans.note(token)
        return self._allowed is not None and self._allowed.accept(token)

    def change(self, logits: np.ndarray) -> np.ndarray:
        """The logits float32 [vocabulary] with all that this answer changes of them, as a copy."""
        sampling, changed = self.sampling, logits.copy()
        if sampling.repetition_penalty != 1:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = changed[seen], np.float32(sampling.repetition_penalty)
            changed[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts:
            ids = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            changed[ids] -= np.float32(sampling.presence_penalty)
            changed[ids] -= np.float32(sampling.frequency_penalty) * counts
        for token, bias in (sampling.logit_bias or {}).items():
            changed[token] += np.float32(bias)
        if self._allowed is not None:
            changed[~self._allowed.mask()] = -np.inf
        if self._num < self._min_tokens:
            changed[self._ends] = -np.inf
        changed[self._bans.tokens()] = -np.inf
        return changed

    def choose(self, logits: np.ndarray) -> int:
        """The next token, of logits float32 [vocabulary] of which nothing is changed yet.

        Raises InputError: all that may come is forbidden.
        """
        if self.changes_logits:
            logits = self.change(logits)
        values, tokens = likeliest(logits, self.num_candidates(len(logits)))
        if values[0] == -np.inf:
            raise InputError(
                "no token is left that may come next: suppress_tokens, bad_words_ids,"
                " no_repeat_ngram_size, min_tokens and grammar forbid all of them together; loosen"
                " one"
            )
        return int(draw([self], values[None], tokens[None])[0])


def likeliest(logits: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits, tokens) of the highest, from the highest down; of equal ones the lower token."""
    if num == 1:
        best = np.array([np.argmax(logits)])
        return logits[best], best
    if num < len(logits) // 4:
        least = -np.partition(-logits, num - 1)[num - 1]
        few = np.flatnonzero(logits >= least)
        order = few[np.argsort(-logits[few], kind="stable")][:num]
    else:
        order = np.argsort(-logits, kind="stable")[:num]
    return logits[order], order


def draw(samplers: Sequence[Sampler], logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The next token of several answers by chance, int64 [m].

    Args:
        samplers: of each.
        logits: float32 [m, candidates], from the highest down.
        tokens: int64 [m, candidates]: whose logits these are.
    """
    of = [sampler.sampling for sampler in samplers]
    warm = np.array([1.0 if one.is_greedy else one.temperature for one in of])[:, None]
    top_k = np.array([1 if one.is_greedy else one.top_k or tokens.shape[1] for one in of])[:, None]
    top_p = np.array([one.top_p for one in of])[:, None]
    min_p = np.array([one.min_p for one in of])[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (logits.astype(np.float64) - logits[:, :1]) / warm
    share = np.exp(scaled)
    share[np.arange(tokens.shape[1]) >= top_k] = 0.0
    # Sums in order, so that candidates beyond top_k change none of them by a rounding.
    share /= np.cumsum(share, axis=1)[:, -1:]
    before = np.cumsum(share, axis=1) - share
    share[:, 1:][before[:, 1:] >= top_p] = 0.0  # the first one always stays
    share[share < min_p * share[:, :1]] = 0.0
    reached = np.cumsum(share, axis=1)
    drawn = np.array([sampler.uniform() for sampler in samplers])[:, None] * reached[:, -1:]
    chosen = np.minimum((reached <= drawn).sum(axis=1, keepdims=True), tokens.shape[1] - 1)
    return np.take_along_axis(tokens, chosen, axis=1)[:, 0]


def log_shares(logits: np.ndarray) -> np.ndarray:
    """log softmax of logits float32 [m, vocabulary], in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    logs: np.ndarray = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return logs
