"""The calls of tools in a text, however it is cut."""

import pytest

from loraexport_serve.errors import ApiError
from loraexport_serve.routes.generation.calls import CallReader, call_grammar
from loraexport_serve.routes.generation.messages import (
    CalledFunction,
    Function,
    Message,
    TextPart,
    Tool,
    ToolCall,
    template_messages,
    template_tools,
)

TWO = (
    'so<tool_call>\n{"name": "a", "arguments": {"x": [1, "<b>"]}}\n</tool_call>\n'
    '<tool_call>{"name": "b"}</tool_call>'
)


def read(text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of a text that comes in pieces of a size."""
    reader = CallReader()
    parts = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(reader.finish())
    calls = [call for _, given in parts for call in given]
    assert [call.index for call in calls] == list(range(reader.num_calls))
    content = "".join(content for content, _ in parts)
    return content, [(call.function.name, call.function.arguments) for call in calls]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
def test_two_calls(size: int) -> None:
    content, calls = read(TWO, size)
    assert content.strip() == "so"
    assert calls == [("a", '{"x":[1,"<b>"]}'), ("b", "{}")]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "a < b <tool",
        "<tool_call>no JSON</tool_call> and more",
        '<tool_call>["name"]</tool_call>',
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": "a", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "a", "argu',
        "<tool_call>" + "[" * 5000,
        "</tool_call>",
    ],
)
def test_what_is_no_call_is_content(text: str, size: int) -> None:
    assert read(text, size) == (text, [])


def test_a_call_that_ends_with_the_text() -> None:
    assert read('<tool_call>{"name": "a", "arguments": {}}', 4) == ("", [("a", "{}")])


def test_text_is_held_back_only_where_a_call_may_begin() -> None:
    reader = CallReader()
    assert reader.push("a <to") == ("a ", [])
    assert reader.push("ast>") == ("<toast>", [])


def test_the_grammar_of_calls() -> None:
    one, other = Function(name='a "b"', parameters={"required": ["x"]}), Function(name="c")
    assert call_grammar([one, other], True).text == (
        'start: call ("\\n" call)*\n'
        'call: "<tool_call>\\n{\\"name\\": " (call_0 | call_1) "}\\n</tool_call>"\n'
        'call_0: "\\"a \\\\\\"b\\\\\\"\\", \\"arguments\\": "'
        ' %json {"type": "object", "required": ["x"]}\n'
        'call_1: "\\"c\\", \\"arguments\\": "'
        ' %json {"type": "object", "additionalProperties": false}\n'
    )
    assert call_grammar([one], False).text.startswith("start: call\n")


def test_messages_as_templates_read_them() -> None:
    called = ToolCall(function=CalledFunction(name="f", arguments='{"a": 1}'), id="c", index=0)
    given = [
        Message(
            role="user", content=[TextPart(type="text", text="a"), TextPart(type="text", text="b")]
        ),
        Message(role="assistant", tool_calls=[called]),
    ]
    assert template_messages(given) == [
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "tool_calls": [
                {"type": "function", "id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
    ]
    tool = Tool(type="function", function=Function(name="f", parameters={"type": "object"}))
    assert template_tools([tool]) == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    ]


@pytest.mark.parametrize("arguments", ["[1]", "{", "NaN", "3"])
def test_arguments_that_are_no_object(arguments: str) -> None:
    called = ToolCall(function=CalledFunction(name="f", arguments=arguments))
    with pytest.raises(ApiError, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        template_messages([Message(role="assistant", tool_calls=[called])])
