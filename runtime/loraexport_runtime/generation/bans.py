"""Tokens that may not come next, by what stands before: as transformers' logits processors of the
same names have it."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np


class Bans:
    """What of one text is forbidden as it grows.

    Of `suppress_tokens` none ever comes; `no_repeat_ngram_size` n lets no n tokens in a row come
    that the text, prompt and answer, has already; the last token of one of `bad_words_ids` does not
    come behind its others.
    """

    def __init__(
        self,
        suppressed: Iterable[int],
        bad_words: Iterable[Sequence[int]],
        ngram_size: int,
        prompt: Iterable[int],
        ends: Collection[int],
    ) -> None:
        """`ends`: the tokens that end the text, of which none is a bad word by itself."""
        words = [tuple(word) for word in bad_words]
        alone = {word[0] for word in words if len(word) == 1} - {*ends}
        self._always = np.array(sorted({*suppressed} | alone), dtype=np.int64)
        self._words: dict[tuple[int, ...], set[int]] = defaultdict(set)
        """The first tokens of bad words -> the last ones."""
        for word in words:
            if len(word) > 1:
                self._words[word[:-1]].add(word[-1])
        self._lengths = sorted({len(first) for first in self._words})
        self._ngram_size = ngram_size
        self._ngrams: dict[tuple[int, ...], set[int]] = defaultdict(set)
        """n - 1 tokens of the text -> what has followed them."""
        self._most = max([ngram_size - 1, *self._lengths])
        self._last: tuple[int, ...] = ()
        """The end of the text, as far as it is looked at."""
        for token in prompt if ngram_size or self._lengths else ():
            self.note(int(token))

    @property
    def are_any(self) -> bool:
        """Whether it may forbid a token at all."""
        return bool(len(self._always) or self._lengths or self._ngram_size)

    def note(self, token: int) -> None:
        """One more token of the text."""
        before = self._end(self._ngram_size - 1) if self._ngram_size else None
        if before is not None:
            self._ngrams[before].add(token)
        if self._most > 0:
            self._last = (*self._last, token)[-self._most :]

    def tokens(self) -> np.ndarray:
        """int64 [m]: those that may not come next."""
        found: set[int] = set()
        for length in self._lengths:
            found |= self._words.get(self._end(length) or (), set())
        if self._ngram_size and (before := self._end(self._ngram_size - 1)) is not None:
            found |= self._ngrams.get(before, set())
        return np.concatenate([self._always, np.array(sorted(found), dtype=np.int64)])

    def _end(self, length: int) -> tuple[int, ...] | None:
        """The last tokens of the text; None: it has fewer."""
        start = len(self._last) - length
        return None if start < 0 else self._last[start:]
