"""Chats by OpenAI's own client: what the runtime gives for each alone, whole and as it comes."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from support.serving import ALL, RESTRICTED, Server, error

from loraexport_runtime import TextGenerator

ADAPTERS = {"llama": None, "first": "first", "llama:second": "second"}
HELLO: Any = [{"role": "user", "content": "hello world"}]
TEXTS = ("hello", "the adapters", "a batch of")


def chat(text: str) -> Any:
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]


def events(server: Server, path: str = "/v1/chat/completions", **body: Any) -> list[str]:
    """The data of each event of a stream."""
    response = server.post(path, stream=True, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def chunks(server: Server, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
    """The same without `[DONE]`, read."""
    *given, done = events(server, path, **body)
    assert done == "[DONE]"
    return [json.loads(one) for one in given]


def joined(given: list[Any], choice: int = 0) -> str:
    of = [one["choices"][0] for one in given if one["choices"]]
    return "".join(one["delta"].get("content", "") for one in of if one["index"] == choice)


@pytest.mark.parametrize("model", ADAPTERS)
def test_whole(openai_client: openai.OpenAI, generator: TextGenerator, model: str) -> None:
    """Also the tokens that are counted."""
    answer = openai_client.chat.completions.create(model=model, messages=HELLO, max_tokens=12)
    (known,) = generator.generate([HELLO], [ADAPTERS[model]], max_new_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == known.text
    assert choice.message.role == "assistant"
    assert (choice.finish_reason, choice.index) == (known.finish_reason, 0)
    assert (answer.model, answer.object) == (model, "chat.completion")
    assert answer.usage is not None
    prompt = len(generator.tokenizer.encode_chat(HELLO))
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len(known.tokens)
    assert answer.usage.total_tokens == prompt + len(known.tokens)


def test_a_mixed_batch_of_streams(chats: Server, generator: TextGenerator) -> None:
    """Base and adapters at once, likeliest tokens and drawn ones: each as alone."""
    asks = [
        {"model": model, "messages": chat(text), "temperature": temperature, "seed": 7}
        for model in ADAPTERS
        for text in TEXTS
        for temperature in (0.0, 0.9)
    ]

    async def ask(client: openai.AsyncOpenAI, options: Any) -> str:
        stream = await client.chat.completions.create(**options, max_tokens=24, stream=True)
        texts = [one.choices[0].delta.content or "" async for one in stream]
        return "".join(texts)

    async def ask_all() -> list[str]:
        url = f"{chats.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, options) for options in asks))

    given = asyncio.run(ask_all())
    alone = []
    for options in asks:
        (known,) = generator.generate(
            [options["messages"]],
            [ADAPTERS[options["model"]]],
            max_new_tokens=24,
            temperature=options["temperature"],
            seed=7,
        )
        alone.append(known.text)
    assert given == alone
    assert len(set(given)) == len(asks)


def test_a_blend(chats: Server, generator: TextGenerator) -> None:
    weights = {"first": 0.5, "second": 0.75}
    given = chunks(chats, model="llama", adapters=weights, messages=HELLO, max_tokens=8)
    (known,) = generator.generate([HELLO], [weights], max_new_tokens=8)
    assert joined(given) == known.text


def test_events_of_a_stream(chats: Server) -> None:
    given = chunks(
        chats,
        model="first",
        messages=HELLO,
        max_tokens=8,
        stream_options={"include_usage": True},
    )
    assert given[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *most, last, usage = given
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert all(one["choices"][0]["finish_reason"] is None for one in most)
    assert all(one["usage"] is None for one in (*most, last))
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert len({(one["id"], one["created"], one["model"], one["object"]) for one in given}) == 1
    plain = chunks(chats, model="first", messages=HELLO, max_tokens=8)
    assert joined(plain) == joined(given)
    assert not any("usage" in one for one in plain)


def test_several_answers(chats: Server) -> None:
    body = {"model": "second", "messages": HELLO, "n": 3, "temperature": 1.5, "max_tokens": 9}
    whole = chats.post("/v1/chat/completions", **body, seed=-5).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert whole["usage"]["completion_tokens"] == 27
    given = chunks(chats, **body, seed=-5)
    assert [joined(given, index) for index in range(3)] == texts
    assert sum(one["choices"][0]["finish_reason"] == "length" for one in given) == 3
    others = chats.post("/v1/chat/completions", **body, seed=6).json()
    assert [choice["message"]["content"] for choice in others["choices"]] != texts


def test_a_stop_string_is_no_part(chats: Server) -> None:
    body: Any = {"model": "first", "messages": HELLO, "max_tokens": 12}
    text = chats.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
    stop = text[4:6]
    (choice,) = chats.post("/v1/chat/completions", **body, stop=stop).json()["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    given = chunks(chats, **body, stop=["never that", stop])
    assert joined(given) == text[: text.index(stop)]
    assert given[-1]["choices"][0]["finish_reason"] == "stop"


def test_logprobs(chats: Server) -> None:
    body: Any = {"model": "first", "messages": HELLO, "max_tokens": 6}
    body |= {"logprobs": True, "top_logprobs": 3}
    whole = chats.post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
    assert len(whole) == 6
    for one in whole:
        values = [other["logprob"] for other in one["top_logprobs"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert one["logprob"] == values[0] < 0  # the likeliest is taken
        assert (one["bytes"] is None) == ("\ufffd" in one["token"])
    parts = [one["choices"][0]["logprobs"] for one in chunks(chats, **body)]
    told = [one for part in parts if part for one in part["content"]]
    assert [one["token"] for one in told] == [one["token"] for one in whole]
    (bare,) = chats.post("/v1/chat/completions", **body | {"top_logprobs": None}).json()["choices"]
    assert all(one["top_logprobs"] == [] for one in bare["logprobs"]["content"])


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "field",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA},
            }
        },
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
def test_a_schema_is_kept(chats: Server, field: Any) -> None:
    body = {"model": "second", "messages": HELLO, "temperature": 1.0, "seed": 1} | field
    (choice,) = chats.post("/v1/chat/completions", **body).json()["choices"]
    assert json.loads(choice["message"]["content"]) in ({"a": "x"}, {"a": "y"})
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "field",
    [
        {"guided_regex": "(yes|no)[.]"},
        {"guided_choice": ["yes.", "no."]},
        {"guided_grammar": 'start: ("yes" | "no") "."'},
        {"structured_outputs": {"choice": ["yes.", "no."]}},
    ],
)
def test_a_form_is_kept(chats: Server, field: Any) -> None:
    (choice,) = chats.post("/v1/chat/completions", model="first", messages=HELLO, **field).json()[
        "choices"
    ]
    assert choice["message"]["content"] in ("yes.", "no.")


def test_any_object(chats: Server) -> None:
    body = {"messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 3}
    (choice,) = chats.post("/v1/chat/completions", **body).json()["choices"]
    assert choice["message"]["content"].startswith("{")


def tool(name: str, parameters: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOL = tool("f", {"type": "object"})
NAMED = {"type": "function", "function": {"name": "f"}}
DEFINED = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/few"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"few": {"enum": [1, 2]}},
}
"""Its references stay its own, beside other tools."""
CALL = r'hi<tool_call>\n\{"name": "f", "arguments": \{"a": 1\}\}\n</tool_call>'


def test_calls_of_tools(chats: Server, openai_client: openai.OpenAI) -> None:
    """A grammar has the model write one."""
    body: Any = {"model": "first", "messages": HELLO, "tools": [TOOL], "guided_regex": CALL}
    (choice,) = chats.post("/v1/chat/completions", **body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "hi"
    (call,) = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    given = chunks(chats, **body)
    assert joined(given) == "hi"
    assert given[-1]["choices"][0]["finish_reason"] == "tool_calls"
    deltas = [one["choices"][0]["delta"] for one in given]
    ((told,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert (told["index"], told["function"]["arguments"]) == (0, '{"a":1}')
    untold = chats.post("/v1/chat/completions", **body | {"tool_choice": "none"}).json()
    assert untold["choices"][0]["message"]["content"].startswith("hi<tool_call>")
    # What a client gave back is a chat.
    answer = openai_client.chat.completions.create(
        model="first",
        messages=HELLO,
        tools=[TOOL],
        extra_body={"guided_regex": CALL},  # type: ignore[list-item]
    )
    message = answer.choices[0].message
    assert message.tool_calls is not None
    result: Any = {"role": "tool", "content": "2", "tool_call_id": message.tool_calls[0].id}
    again = openai_client.chat.completions.create(
        model="first",
        messages=[*HELLO, message, result],
        max_tokens=2,
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens > 22


FLAG = {"properties": {"a": {"type": "boolean"}}, "required": ["a"], "type": "object"}
STRICT = {**FLAG, "additionalProperties": False}


def test_what_langchain_sends(chats: Server) -> None:
    """ChatOpenAI's requests: a tool's result, a schema, a tool that must be called."""
    body: Any = {"model": "first", "max_completion_tokens": 90, "seed": 2, "temperature": 1.0}
    function = {"name": "P", "description": "", "parameters": FLAG}
    call = {
        "type": "function",
        "id": "call_1",
        "function": {"name": "P", "arguments": '{"a": true}'},
    }
    told = [
        {"content": "hello", "role": "user"},
        {"content": None, "role": "assistant", "tool_calls": [call]},
        {"content": "sun", "role": "tool", "tool_call_id": "call_1"},
    ]
    tools = [{"type": "function", "function": function}]
    answer = chats.post("/v1/chat/completions", messages=told, tools=tools, **body).json()
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    form = {"type": "json_schema", "json_schema": {"schema": STRICT, "name": "P", "strict": True}}
    answer = chats.post("/v1/chat/completions", messages=told[:1], response_format=form, **body)
    content = answer.json()["choices"][0]["message"]["content"]
    assert json.loads(content)["a"] in (True, False)
    body |= {"parallel_tool_calls": False, "tool_choice": NAMED | {"function": {"name": "P"}}}
    tools = [{"type": "function", "function": function | {"parameters": STRICT, "strict": True}}]
    given = chunks(chats, messages=told[:1], tools=tools, **body)
    deltas = [one["choices"][0]["delta"] for one in given]
    ((made,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert json.loads(made["function"]["arguments"])["a"] in (True, False)
    assert given[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"f", "g h"}),
        ({"tool_choice": {"type": "function", "function": {"name": "g h"}}}, {"g h"}),
    ],
)
def test_a_call_is_forced(chats: Server, choice: Any, names: set[str]) -> None:
    """Its arguments match the function's schema, however unlikely all of it is."""
    tools = [tool("f", DEFINED), tool("g h", DEFINED)]
    tools[0]["function"]["strict"] = True
    body: Any = {"model": "second", "messages": HELLO, "tools": tools, "max_tokens": 100}
    body |= choice | {"temperature": 1.0, "seed": 3}
    (whole,) = chats.post("/v1/chat/completions", **body).json()["choices"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    (call,) = whole["message"]["tool_calls"]
    assert call["function"]["name"] in names
    assert json.loads(call["function"]["arguments"]) in ({"a": 1}, {"a": 2})
    given = chunks(chats, **body)
    assert joined(given) == ""
    deltas = [one["choices"][0]["delta"] for one in given]
    ((told,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert told["function"] == call["function"]


def test_parts_of_a_content(chats: Server, generator: TextGenerator) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    body: Any = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    (choice,) = chats.post("/v1/chat/completions", **body).json()["choices"]
    whole = [{"role": "user", "content": "hello\nworld"}]
    assert choice["message"]["content"] == generator.generate([whole], max_new_tokens=4)[0].text


def test_an_answer_takes_the_room_that_is_left(chats: Server, generator: TextGenerator) -> None:
    body: Any = {"model": "llama", "messages": HELLO, "ignore_eos": True}
    answer = chats.post("/v1/chat/completions", **body).json()
    assert answer["usage"]["total_tokens"] == 128
    assert answer["choices"][0]["finish_reason"] == "length"
    room = 128 - len(generator.tokenizer.encode_chat(HELLO))
    for name in ("max_tokens", "max_completion_tokens"):
        assert chats.post("/v1/chat/completions", **body | {name: room}).is_success
        refused = chats.post("/v1/chat/completions", **body | {name: room + 1})
        assert error(refused) == (400, "context_length_exceeded")
    long = [{"role": "user", "content": "hello " * 200}]
    assert error(chats.post("/v1/chat/completions", messages=long)) == (
        400,
        "context_length_exceeded",
    )


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("n", {"n": 129}),
        ("n", {"n": 0}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("tool_choice", {"tool_choice": "auto"}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("tool_choice", {"tool_choice": NAMED | {"function": {"name": "g"}}, "tools": [TOOL]}),
        ("guided_regex", {"tool_choice": "required", "tools": [TOOL], "guided_regex": "a"}),
        ("tools", {"tool_choice": "required", "tools": [tool("f", {"type": "array"})]}),
        ("tools", {"tool_choice": "required", "tools": [tool("f", {"properties": 3})]}),
        ("tools", {"tool_choice": "required", "tools": [tool("f", {"x": "y" * 70_000})]}),
        ("parallel_tool_calls", {"parallel_tool_calls": False, "tools": [TOOL]}),
        (
            "tools[0].function.strict",
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        ),
        ("adapters", {"adapters": {"first": 1e39}}),
        ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 3}),
        ("min_tokens", {"min_tokens": 4, "max_tokens": 3}),
        ("stop", {"stop": [""]}),
        ("logit_bias", {"logit_bias": {"320": 1}}),
        ("stop_token_ids", {"stop_token_ids": [320]}),
        ("guided_regex", {"guided_regex": "("}),
        ("guided_grammar", {"guided_grammar": "start: x"}),
        ("guided_json", {"guided_json": "[1]"}),
        ("guided_json", {"guided_json": '{}, "lark": ""'}),
        ("guided_json", {"guided_json": {"type": "nothing"}}),
        ("guided_json", {"guided_json": {}, "guided_regex": "a"}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("temperature", {"temperature": -1}),
        ("audio", {"audio": {"voice": "a"}}),
        ("messages[0].content[0].type", {"messages": [{"role": "a", "content": [{"type": "b"}]}]}),
        ("skip_special_tokens", {"skip_special_tokens": False}),
        ("messages", {"chat_template_kwargs": {"messages": []}}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(chats: Server, param: str, body: Any) -> None:
    refused = chats.post("/v1/chat/completions", **{"messages": HELLO} | body)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


def test_chat_py(chats: Server) -> None:
    """examples/serve/chat.py asks every model of a server."""
    program = Path(__file__).resolve().parents[3] / "examples/serve/chat.py"
    command = [sys.executable, str(program), chats.url, "hello", "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    for name in ("llama: ", "first: ", "second: "):
        assert f"\n{name}" in f"\n{done.stdout}"


def test_whom_a_chat_means(many: Server) -> None:
    def ask(key: str, **body: Any) -> tuple[int, str | None]:
        return error(many.post("/v1/chat/completions", key=key, messages=HELLO, **body))

    assert ask(ALL, model="nobody") == (404, "model_not_found")
    assert ask(RESTRICTED, model="first") == (404, "model_not_found")
    assert ask(ALL, model="tiny")[0] == 400
    answer = many.post("/v1/chat/completions", key=ALL, model="first", messages=HELLO, max_tokens=1)
    assert answer.json()["model"] == "first"
