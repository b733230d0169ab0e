"""Tokens that may not come: token for token as transformers' logits processors have it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from support.decoders import ADAPTERS, EOS, Peft, make_prompts, write_family
from support.home import Home

import loraexport_runtime as lr
from loraexport_runtime.generation.sampling import Sampler, Sampling

VOCABULARY = 7


def _processors(sampling: Sampling, ends: list[int]) -> list[Any]:
    every: list[Any] = []
    if sampling.no_repeat_ngram_size:
        every.append(tf.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    words = [list(word) for word in sampling.bad_words_ids]
    if words:
        every.append(tf.NoBadWordsLogitsProcessor(words, ends))
    if sampling.suppress_tokens:
        every.append(tf.SuppressTokensLogitsProcessor(list(sampling.suppress_tokens)))
    return every


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(suppress_tokens=[0, 5]),
        *(Sampling(no_repeat_ngram_size=size) for size in (1, 2, 3, 5)),
        Sampling(bad_words_ids=[[3]]),
        Sampling(bad_words_ids=[[6], [2], [6, 6]]),  # 6 ends the text, and is no bad word alone
        Sampling(bad_words_ids=[[1, 2], [1, 2, 3], [4, 1, 2, 0], [1, 5], [2, 2]]),
        Sampling(suppress_tokens=[4], no_repeat_ngram_size=3, bad_words_ids=[[0, 1], [5]]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("length", [1, 2, 6])
def test_the_logits_are_those_of_transformers(sampling: Sampling, length: int) -> None:
    random = np.random.default_rng(length)
    for _ in range(30):
        prompt = random.integers(0, VOCABULARY, length).tolist()
        sampler, text = Sampler(sampling, prompt, ends=[6]), torch.tensor([prompt])
        processors = _processors(sampling, [6])
        assert not sampler.takes_likeliest
        for _ in range(12):
            logits = random.standard_normal(VOCABULARY).astype(np.float32)
            wanted = torch.from_numpy(logits)[None]
            for processor in processors:
                wanted = processor(text, wanted)
            assert sampler.change(logits).tolist() == wanted[0].tolist(), text
            token = int(random.integers(0, VOCABULARY))
            sampler.note(token)
            text = torch.cat([text, torch.tensor([[token]])], dim=1)


def test_nothing_is_left() -> None:
    sampler = Sampler(Sampling(suppress_tokens=[0, 1], no_repeat_ngram_size=1), [2])
    with pytest.raises(lr.InputError, match="no token is left that may come next: suppress_tokens"):
        sampler.choose(np.zeros(3, np.float32))
    assert Sampler(Sampling(no_repeat_ngram_size=1), [2]).choose(np.zeros(3, np.float32)) == 0


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    return home.artifact(write_family, "Llama")


def test_an_answer_is_that_of_transformers(artifact: Path) -> None:
    """Of a call, each row as PEFT's generate with the same options."""
    peft, prompts, steps = Peft(artifact.parents[1]), make_prompts(9, 4), 24
    with lr.load_generator(artifact) as generator:
        plain = generator.generate(prompts, ADAPTERS, max_new_tokens=steps)
        for options in _options(plain[0].tokens):
            found = generator.generate(prompts, ADAPTERS, max_new_tokens=steps, **options)
            for row, (prompt, adapter) in enumerate(zip(prompts, ADAPTERS, strict=True)):
                wanted = peft.generate(prompt, adapter, steps, **options)
                assert found[row].tokens == wanted, (options, row)
            assert found[0].tokens != plain[0].tokens, options


def _options(tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Each of which changes these tokens."""
    words = [list(tokens[3:5]), list(tokens[6:9]), [EOS], [tokens[10]]]
    every: dict[str, Any] = {"suppress_tokens": [tokens[0], tokens[5]], "bad_words_ids": words}
    every["no_repeat_ngram_size"] = 1
    return [*({key: value} for key, value in every.items()), every]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"suppress_tokens": [300]}, r"suppress_tokens\[0\] is 300; expected a token id"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; expected a whole number from"),
        ({"bad_words_ids": [5]}, r"bad_words_ids\[0\] is 5; expected a list of token ids"),
        ({"bad_words_ids": "no"}, "bad_words_ids is 'no'; expected lists of token ids"),
        ({"bad_words_ids": [[5], []]}, r"bad_words_ids\[1\] is empty; a word has one token"),
        ({"bad_words_ids": [[5, -1]]}, r"bad_words_ids\[0\]\[1\] is -1; expected a token id"),
    ],
)
def test_a_request_that_cannot_be(options: dict[str, Any], text: str) -> None:
    from loraexport_runtime.generation.request import GenerationRequest, checked

    with pytest.raises(lr.InputError, match=text):
        checked(GenerationRequest(tokens=[5], max_tokens=8, **options), 300, 64)


def test_arrays_are_taken() -> None:
    from loraexport_runtime.generation.request import GenerationRequest, checked

    words: Any = np.array([[5, 6]])
    request = GenerationRequest(tokens=[5], max_tokens=8, bad_words_ids=words)
    assert checked(request, 300, 64).bad_words_ids == [[5, 6]]
