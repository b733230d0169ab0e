"""generation_config.json: what is computed, what changes nothing, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import loraexport_runtime as lr
from loraexport_runtime.generation.text.defaults import _KINDS, _NO_EFFECT, _OFF

FILE = Path("generation_config.json")


def parse(**values: Any) -> lr.GenerationDefaults:
    return lr.GenerationDefaults.parse(values, [2], FILE)


def test_a_config_as_published_ones_are() -> None:
    found = parse(
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=0,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        repetition_penalty=1.05,
        max_length=4096,
        transformers_version="4.51.0",
    )
    assert found == lr.GenerationDefaults(
        0.6, 20, 0.95, repetition_penalty=1.05, max_length=4096, ends=(2,)
    )


def test_a_config_that_does_not_sample_is_greedy() -> None:
    assert parse(temperature=0.6, top_p=0.9) == lr.GenerationDefaults(0.0, 50, 0.9, ends=(2,))
    assert parse(do_sample=False) == parse() == lr.GenerationDefaults(ends=(2,))
    assert parse(do_sample=True).temperature == 1.0
    assert parse(do_sample=True, top_k=0, min_p=0.1) == lr.GenerationDefaults(
        1.0, 0, min_p=0.1, ends=(2,)
    )


def test_tokens_that_may_not_come() -> None:
    found = parse(suppress_tokens=[3, 4], no_repeat_ngram_size=3, bad_words_ids=[[5, 6], [7]])
    assert found == lr.GenerationDefaults(
        suppress_tokens=(3, 4), no_repeat_ngram_size=3, bad_words_ids=((5, 6), (7,)), ends=(2,)
    )


def test_every_key_of_transformers_is_known() -> None:
    assert vars(tf.GenerationConfig()).keys() - _KINDS.keys() - _OFF.keys() - _NO_EFFECT == set()
    values = tf.GenerationConfig()._get_default_generation_params()
    assert parse(**values) == lr.GenerationDefaults(max_length=20, ends=(2,))


@pytest.mark.parametrize("key", sorted(_OFF))
def test_a_key_that_would_change_the_tokens_is_refused_by_name(key: str) -> None:
    for neutral in (None, *_OFF[key]):
        assert parse(**{key: neutral}) == parse()
    with pytest.raises(lr.ArtifactError, match=f"{key} is 7, which changes the tokens and is not"):
        parse(**{key: 7})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": 1}, "unknown key 'sampler', which may change the tokens; remove it"),
        ({"do_sample": 1}, "do_sample is 1; expected true or false: correct it"),
        ({"temperature": -1}, "temperature is -1; expected a number of 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number"),
        ({"temperature": "0.6"}, "temperature is '0.6'; expected a number"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a count"),
        ({"top_k": True}, "top_k is True; expected a count"),
        ({"top_p": 0}, "top_p is 0; expected a number above 0, up to 1"),
        ({"min_p": 2}, "min_p is 2; expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a count of 1 or more"),
        ({"suppress_tokens": [-1]}, r"suppress_tokens is .*; expected a list of token ids"),
        ({"no_repeat_ngram_size": "3"}, "no_repeat_ngram_size is '3'; expected a count"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is .*; expected a list of lists of token ids, no"),
        ({"stop_strings": ["a", ""]}, "stop_strings is .*; expected a text or a list of texts"),
    ],
)
def test_a_value_that_is_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(lr.ArtifactError, match=message):
        parse(**values)
