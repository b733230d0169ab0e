"""The tokens of an answer as they come -> its text, up to a stop string."""

from collections.abc import Sequence

from .cleaning import clean, settled
from .decoding import Decoding
from .tokenizer import Tokenizer


class TextStream:
    """The text of one answer.

    What is given, joined, is what the tokenizer decodes all tokens to, up to the stop string that
    is whole first. Text that may still become another character, or a stop string, is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        """`min_tokens`: no stop string begins in the text of the tokens before this one."""
        self._decoding = Decoding(tokenizer)
        self._cleans_up = tokenizer.cleans_up
        self._raw = ""
        """Decoded text that is not cleaned up yet."""
        self._stop = tuple(stop)
        self._num_free = max(0, min_tokens - 1)
        """So many tokens are still to come in whose text no stop string counts."""
        self._held = ""
        """Text that was not given yet."""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int) -> str:
        """The text that a token adds for sure; none after a stop string."""
        if self.stopped is not None:
            return ""
        self._num_free -= 1
        text = self._decoding.push(token)
        if self._cleans_up:
            self._raw += text
            end = settled(self._raw, 0)
            text, self._raw = clean(self._raw[:end]), self._raw[end:]
        return self._give(text)

    def finish(self) -> str:
        """What was held back, once no token comes any more; none after a stop string."""
        if self.stopped is not None:
            return ""
        text = self._decoding.finish()
        if self._cleans_up:
            text, self._raw = clean(self._raw + text), ""
        text = self._give(text)
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _give(self, text: str) -> str:
        """More text, as much of it as is no beginning of a stop string."""
        if not text or not self._stop or self._num_free >= 0:
            return text
        whole, before = self._held + text, len(self._held)
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := whole.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if ends:
            _, start, self.stopped = min(ends)
            self._held = ""
            return whole[:start]
        held = max(overlap(whole, stop) for stop in self._stop)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]


def overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text a stop string begins with; never all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
