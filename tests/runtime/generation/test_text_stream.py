"""A stream of tokens: the text of the whole, held back where it may still change."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import KINDS, byte_level, metaspace, runtime_form, unigram, wrap

from loraexport_runtime.generation.text.cleaning import clean, settled
from loraexport_runtime.generation.text.stream import TextStream
from loraexport_runtime.generation.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' form of a tokenizer, and the runtime's."""
    plain = wrap(KINDS[request.param]())
    return plain, runtime_form(plain, tmp_path_factory.mktemp("tokenizer"))


def _stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_random_ids_decode_as_the_whole_does(pair: Any) -> None:
    plain, tokenizer = pair
    draw = random.Random(0)
    for length in (1, 2, 3, 7, 40, 200) * 25:
        ids = [draw.randrange(len(plain) + 3) for _ in range(length)]
        whole = plain.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == whole
        assert "".join(_stream(tokenizer, ids)) == whole


def test_bytes_and_spaces_decode_as_the_whole_does(pair: Any) -> None:
    """The tokens at which decoders look at their neighbours, long enough for many windows."""
    plain, tokenizer = pair
    odd = [
        index
        for index in range(len(plain))
        if (token := plain.convert_ids_to_tokens(index)).startswith(("<0x", "▁", "Ġ", "<"))
        or len(token) == 1
    ]
    draw = random.Random(1)
    for _ in range(60):
        ids = draw.choices(odd, k=150)
        assert "".join(_stream(tokenizer, ids)) == plain.decode(ids, skip_special_tokens=True)


def test_no_half_character_is_given(tmp_path: Path) -> None:
    for make in (byte_level, metaspace):
        plain = wrap(make())
        tokenizer = runtime_form(plain, tmp_path)
        text = "ab é日🙂 c"
        given = _stream(tokenizer, plain.encode(text, add_special_tokens=False))
        assert "".join(given) == text
        assert not any("\ufffd" in part for part in given)
        assert len([part for part in given if part]) > 3  # it is no text at the end alone


def test_bytes_that_never_become_a_character(tmp_path: Path) -> None:
    plain = wrap(byte_level())
    tokenizer = runtime_form(plain, tmp_path)
    first = plain.encode("𝄞", add_special_tokens=False)[0]  # the first byte of four
    assert _stream(tokenizer, [first, first, first]) == ["", "\ufffd", "\ufffd", "\ufffd"]


def test_a_stop_string_is_never_begun(tmp_path: Path) -> None:
    plain = wrap(byte_level())
    tokenizer = runtime_form(plain, tmp_path)

    def stream(text: str, *stop: str) -> tuple[list[str], str | None]:
        stream = TextStream(tokenizer, stop)
        ids = [token for letter in text for token in plain.encode(letter)]
        return [*map(stream.push, ids), stream.finish()], stream.stopped

    assert stream("ab</s", "</stop>") == (["a", "b", "", "", "", "</s"], None)
    assert stream("ab</sx", "</stop>") == (["a", "b", "", "", "", "</sx", ""], None)
    assert stream("a<<b>c", "<b>") == (["a", "", "<", "", "", "", ""], "<b>")
    # the one that is whole first, and of two that end together the longer one
    assert stream("abcd", "abcd", "bc") == (["", "", "a", "", ""], "bc")
    assert stream("abcd", "c", "abc") == (["", "", "", "", ""], "abc")
    assert stream("aab", "ab", "aax") == (["", "", "a", ""], "ab")
    assert stream("xyz") == (["x", "y", "z", ""], None)


def test_no_stop_string_ends_a_shorter_answer(tmp_path: Path) -> None:
    plain = wrap(byte_level())
    stream = TextStream(runtime_form(plain, tmp_path), ["ab", "c"], min_tokens=4)
    parts = [stream.push(plain.encode(letter)[0]) for letter in "abcabd"]
    assert (parts, stream.stopped) == (["a", "b", "c", "", "", ""], "ab")


_LETTERS = st.text(alphabet="ab. '", max_size=30)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(_LETTERS, st.lists(st.text(alphabet="ab. '", min_size=1, max_size=4), max_size=3))
def test_stop_strings_in_any_text(text: str, stop: list[str]) -> None:
    plain, tokenizer = _LETTER_PAIR
    given = TextStream(tokenizer, stop)
    parts = [given.push(plain.convert_tokens_to_ids(letter)) for letter in text.replace(" ", "Ġ")]
    parts.append(given.finish())
    ends = [
        (start + len(end), start, end)
        for end in stop
        for start in range(len(text))
        if text.startswith(end, start)
    ]
    wanted = text[: min(ends)[1]] if ends else text
    assert "".join(parts) == wanted
    assert given.stopped == (min(ends)[2] if ends else None)
    so_far = ""
    for part in parts:
        so_far += part
        assert wanted.startswith(so_far)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.text(alphabet="ns'tmr. e,", max_size=40))
def test_a_settled_text_is_cleaned_by_itself(text: str) -> None:
    end = settled(text, 0)
    assert clean(text[:end]) + clean(text[end:]) == clean(text)


def test_spaces_are_cleaned_up_as_the_config_says(tmp_path: Path) -> None:
    text = "it is n't the adapter 's , don 't . ok it 's ' x ' . " * 8
    for make, options, changes in (
        (unigram, {"clean_up_tokenization_spaces": True}, True),
        (unigram, {}, False),
        (byte_level, {"clean_up_tokenization_spaces": True}, False),
    ):
        plain = wrap(make(), **options)
        tokenizer = runtime_form(plain, tmp_path)
        ids = plain.encode(text, add_special_tokens=False)
        whole = plain.decode(ids, skip_special_tokens=True)
        assert ("isn't" in whole) == changes
        given = _stream(tokenizer, ids)
        assert "".join(given) == whole == tokenizer.decode(ids)
        assert len([part for part in given if part]) > 8


@pytest.fixture(scope="module", autouse=True)
def _letter_pair(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _LETTER_PAIR
    plain = wrap(byte_level())
    _LETTER_PAIR = plain, runtime_form(plain, tmp_path_factory.mktemp("letters"))


_LETTER_PAIR: Any = None
