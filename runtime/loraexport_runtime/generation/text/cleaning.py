"""Spaces ahead of punctuation and English endings are taken out, as some tokenizers ask for.

transformers does so to the whole text; a stream has to know up to where more text changes nothing.
"""

import re

_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Each becomes what it is without its spaces, one after another over the whole text."""
_SETTLED = re.compile(r"[^\W_]{2}(?= )")
"""Two letters or digits ahead of a space: no rule reaches from before them to behind them."""


def clean(text: str) -> str:
    """The text as transformers' clean_up_tokenization gives it."""
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.replace(" ", ""))
    return text


def settled(text: str, start: int) -> int:
    """Up to where a text can be cleaned by itself, whatever comes after: `start` or further."""
    end = start
    for match in _SETTLED.finditer(text, start):
        end = match.end()
    return end
