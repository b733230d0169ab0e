"""Texts whose rotary factors change with their length (longrope): when a row is read again.

With L tokens of a text read and R the decoder's `reread_length`, the graph takes the long factors
where L > R, for all tokens of the text, so that keys in the cache of a row that grows beyond R are
the wrong ones: then the whole row is read again, as transformers does.
"""

READ_LENGTHS = "read_lengths"
"""An input of a graph with longrope, int64 [batch] or [1], that need not be fed: a row is read as a
text of so many tokens, if it is shorter; so the first part of a long prompt reads as the whole."""


def is_long(length: int, reread_length: int | None) -> bool:
    """Whether a text of so many tokens is read with the long factors."""
    return reread_length is not None and length > reread_length


def tokens_until_reread(length: int, reread_length: int | None) -> int | None:
    """How many tokens a text of `length` tokens may get from one reading; None: all.

    The first of them comes of the reading itself, and each that follows of one more token. To get
    another one its `length` and the tokens so far are read again, from the start and together.
    """
    if reread_length is None or is_long(length, reread_length):
        return None
    return reread_length - length + 1
