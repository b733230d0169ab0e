"""Completions by OpenAI's own client, and what no field may do: fail the server."""

from typing import Any

import msgspec
import openai
import pytest
from support.serving import Server, error

from loraexport_runtime import TextGenerator
from loraexport_serve.routes.generation.chat import ChatBody
from loraexport_serve.routes.generation.completions import CompletionBody


def test_prompts_of_each_form(openai_client: openai.OpenAI, generator: TextGenerator) -> None:
    def ask(prompt: Any, **more: Any) -> list[str]:
        answer = openai_client.completions.create(
            model="first", prompt=prompt, max_tokens=7, **more
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    texts = ["hello", "a batch"]
    ids = [generator.tokenizer.encode(text) for text in texts]
    known = [
        one.text
        for one in generator.generate(texts, ["first", "first"], max_new_tokens=7, chat=False)
    ]
    assert ask(texts) == ask(ids) == known
    assert ask(texts[0]) == ask(ids[0]) == known[:1]
    assert ask(texts, n=2) == [known[0], known[0], known[1], known[1]]


def test_a_stream_of_several_prompts(openai_client: openai.OpenAI) -> None:
    options: Any = {"model": "second", "prompt": ["hello", "a batch"], "max_tokens": 5}
    whole = openai_client.completions.create(**options)
    texts, reasons, usage = ["", ""], 0, None
    options["stream_options"] = {"include_usage": True}
    for chunk in openai_client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons += choice.finish_reason == "length"
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == 2
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 10


def test_logprobs(chats: Server) -> None:
    body: Any = {"model": "first", "prompt": "hello", "max_tokens": 6, "logprobs": 2}
    (choice,) = chats.post("/v1/completions", **body).json()["choices"]
    told = choice["logprobs"]
    assert {len(values) for values in told.values()} == {6}
    ends = [at + len(text) for at, text in zip(told["text_offset"], told["tokens"], strict=True)]
    assert told["text_offset"] == [0, *ends[:-1]]
    for token, value, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values())


def test_sixteen_tokens_where_nothing_is_said(chats: Server) -> None:
    body: Any = {"model": "llama", "prompt": [5] * 30, "ignore_eos": True}
    assert chats.post("/v1/completions", **body).json()["usage"]["completion_tokens"] == 16
    body["prompt"] = [5] * 120
    assert chats.post("/v1/completions", **body).json()["usage"]["completion_tokens"] == 8
    body["prompt"] = [5] * 128
    assert error(chats.post("/v1/completions", **body)) == (400, "context_length_exceeded")


def test_a_token_that_is_asked_not_to_come(chats: Server) -> None:
    """Options that change the choice reach the engine."""

    def first(**more: Any) -> list[str]:
        body: Any = {"model": "llama", "prompt": "hello", "max_tokens": 3, "logprobs": 1} | more
        return chats.post("/v1/completions", **body).json()["choices"][0]["logprobs"]["tokens"]

    plain = first()
    assert first(logit_bias={"7": 100}) != plain
    assert len(set(first(logit_bias={"7": 100}))) == 1
    assert first(temperature=9.0, top_k=1) == first(temperature=9.0, min_p=1.0) == plain
    assert first(temperature=9.0, top_p=1e-6) == plain
    assert len(first(logit_bias={"7": 100}, stop_token_ids=[7])) == 0
    assert len(first(logit_bias={"7": 100}, stop_token_ids=[7], min_tokens=2)) == 2
    repeated = first(logit_bias={"7": 10}, repetition_penalty=100.0)
    assert len(set(repeated)) > 1


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("echo", {"echo": True}),
        ("suffix", {"suffix": "a"}),
        ("best_of", {"best_of": 2}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", 3]}),
        ("prompt", {"prompt": ""}),
        ("add_special_tokens", {"prompt": [3], "add_special_tokens": True}),
        (None, {"prompt": [320]}),
        (None, {"prompt": [-1]}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    chats: Server, param: str | None, body: Any
) -> None:
    refused = chats.post("/v1/completions", **{"prompt": "a"} | body)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


def test_more_prompts_than_the_server_takes(chats: Server) -> None:
    refused = chats.post("/v1/completions", prompt=[[3]] * 100, n=100)
    assert error(refused) == (413, "batch_too_large")


WRONG: list[Any] = [True, -1, 3.5, 2**70, "a", "", [], [[]], [None], {}, {"a": []}, [{"a": 1}]]


@pytest.mark.parametrize(
    ("path", "kind", "good"),
    [
        ("/v1/chat/completions", ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", CompletionBody, {"prompt": "a"}),
    ],
)
def test_no_value_of_a_field_fails_the_server(
    chats: Server, path: str, kind: type[msgspec.Struct], good: dict[str, Any]
) -> None:
    refused = 0
    for name in kind.__struct_fields__:
        for value in WRONG:
            answer = chats.post(path, **{"max_tokens": 1} | good | {name: value})
            assert answer.status_code in (200, 400, 404, 413), (name, value, answer.text)
            refused += answer.status_code != 200
    assert refused > 8 * len(kind.__struct_fields__)
    assert chats.get("/readyz").status_code == 200
