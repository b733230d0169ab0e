"""Chats through the sandboxed renderer: what transformers writes, and nothing beyond its bounds."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.templates import FAMILIES, WEATHER
from support.tokenizers import byte_level, runtime_form, wrap

import loraexport_runtime as lr
from loraexport_runtime.generation.text import sandbox
from loraexport_runtime.generation.text.renderer import TemplateRenderer

USER = {"role": "user", "content": "hello 日本 <b>'\"&"}
SYSTEM = {"role": "system", "content": "be brief /no_think\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nwhy?\n</think>\n\nwell"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"place": "Ü"}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "content": "21"}
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "user": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "history": ([USER, {"role": "assistant", "content": " hi\n"}, USER], {}),
    "thought": ([SYSTEM, USER, THOUGHT, USER], {}),
    "thought-ends": ([USER, THOUGHT], {"add_generation_prompt": False}),
    "reasoning": ([USER, {"role": "assistant", "content": "a", "thinking": "b"}], {}),
    "no-thinking": ([USER], {"enable_thinking": False}),
    "tools": ([SYSTEM, USER], {"tools": [WEATHER]}),
    "calls": ([USER, CALL, RESULT, USER], {"tools": [WEATHER, WEATHER]}),
    "documents": ([USER], {"documents": [{"title": "t", "text": "x"}]}),
    "odd-role": ([{"role": "critic", "content": "no"}], {}),
    "date": ([USER], {"date_string": "1 May 2020", "bos_token": "<<bos>>"}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}),
}


@pytest.fixture(scope="module")
def renderer() -> TemplateRenderer:
    return TemplateRenderer()


@pytest.mark.parametrize("family", FAMILIES)
def test_chats_are_written_as_transformers_writes_them(family: str, tmp_path: Path) -> None:
    plain = wrap(byte_level(), FAMILIES[family])
    tokenizer = runtime_form(plain, tmp_path, {"default": FAMILIES[family]})
    refused = []
    for name, (messages, options) in CHATS.items():
        options = {"add_generation_prompt": True} | options

        def write(options: dict[str, Any] = options, messages: Any = messages) -> tuple[str, Any]:
            text = plain.apply_chat_template(messages, tokenize=False, **options)
            return text, plain.apply_chat_template(messages, return_dict=False, **options)

        try:
            text, ids = write()
        except Exception as error:
            said = str(error)
            with pytest.raises(lr.ChatTemplateError, match=re.escape(said)):
                tokenizer.render_chat(messages, **options)
            refused.append(name)
            continue
        if (found := tokenizer.render_chat(messages, **options)) != text:
            text, ids = write()  # midnight has passed
        assert found == text, name
        assert tokenizer.encode_chat(messages, **options) == ids
    assert set(refused) <= {"calls", "odd-role", "parts", "system"}
    assert "user" not in refused
    tokenizer.close()


BOUNDS = {
    "endless": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop-recursion": "{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "memory": "{{ 'x' * 10**10 }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
}
RANGE = "Range too big. The sandbox blocks ranges larger than MAX_RANGE"
SAID = {
    "endless": RANGE,
    "loops": "past its bounds: more than 1,000,000 turns of its loops and macros; shorten",
    "recursion": "past its bounds: macros or brackets too deep in one another",
    "loop-recursion": "past its bounds: macros or brackets too deep in one another",
    "brackets": "past its bounds: macros or brackets too deep in one another",
    "memory": "past its bounds: more than 1024 MiB of memory",
    "output": "past its bounds: more than 16,777,216 characters of text",
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_template_without_end(renderer: TemplateRenderer, name: str) -> None:
    with pytest.raises(lr.ChatTemplateError, match=SAID[name]) as caught:
        renderer.render(BOUNDS[name], {})
    assert isinstance(caught.value, lr.BatchError)
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


def test_a_template_that_computes_too_long() -> None:
    """In one operation, which no counter sees: the process is ended, and started again."""
    renderer = TemplateRenderer(seconds=0.3)
    with pytest.raises(lr.ChatTemplateError, match=r"does not end within 0\.3 s of computing"):
        renderer.render("{{ 10 ** (10 ** 9) }}", {})
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"
    renderer.close()


ESCAPES = {
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as p %}",
    "extends": "{% extends '/etc/passwd' %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "namespace": "{% set ns = namespace(__x=1) %}",
    "namespace-later": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "mutation": "{{ messages.append(1) }}",
    "file": "{{ 'a'.encode('punycode') }}",  # a codec that Python would have to open a file for
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outside_is_reached(renderer: TemplateRenderer, name: str) -> None:
    said = "refuses this chat: |goes past its bounds: it needs a file"
    with pytest.raises(lr.ChatTemplateError, match=f"the chat template ({said})"):
        print(renderer.render(ESCAPES[name], {"messages": [USER]}))


def test_the_process_has_no_files_and_few_variables() -> None:
    """Were the sandbox left, there would be no file to open, and no secret in the environment."""
    code = (
        "import sys, os; sys.path[:0] = [sys.argv[1]]; import sandbox\n"
        "sandbox.make_environment(); sandbox._limit()\n"
        "for mode in ('r', 'w'):\n"
        "    try: open('/tmp/loraexport-x', mode); print('opened')\n"
        "    except OSError as error: print(error.errno)\n"
    )
    folder = str(Path(sandbox.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.split() == ["24", "24"], done.stderr


def test_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    renderer = TemplateRenderer()
    renderer.render("", {})
    assert renderer._process is not None
    environment = Path(f"/proc/{renderer._process.pid}/environ").read_bytes()
    assert b"SECRET" not in environment
    assert b"TZ=Pacific/Kiritimati" in environment
    renderer.close()


def test_a_process_that_was_killed_is_started_again(renderer: TemplateRenderer) -> None:
    renderer.render("", {})
    assert renderer._process is not None
    renderer._process.kill()
    renderer._process.wait()
    with pytest.raises(lr.ChatTemplateError, match="ends the process that renders it"):
        renderer.render("", {})
    assert renderer.render("x", {}) == "x"


def test_a_stopped_process_does_not_hang_its_parent() -> None:
    import signal

    renderer = TemplateRenderer(seconds=0.05)
    renderer.render("", {})
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGSTOP)
    with pytest.raises(lr.ChatTemplateError, match="does not end"):
        renderer.render("{{ text }}", {"text": "x" * 2**20})  # more than a pipe takes
    renderer.close()


def test_threads_take_turns(renderer: TemplateRenderer) -> None:
    texts: list[str] = []

    def render(index: int) -> None:
        texts.append(renderer.render("{{ i }}" * 50, {"i": index}))

    threads = [threading.Thread(target=render, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(str(index) * 50 for index in range(8))


def test_a_renderer_that_is_dropped_leaves_no_process() -> None:
    renderer = TemplateRenderer()
    renderer.render("", {})
    process = renderer._process
    assert process is not None
    del renderer
    assert process.poll() is not None


def test_a_python_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for python, said in (("/nowhere/python", "cannot be started"), ("/bin/true", "ended before")):
        monkeypatch.setattr(sys, "executable", python)
        with pytest.raises(lr.ProviderError, match=said):
            TemplateRenderer().render("", {})


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "a chat has no message; give one at least"),
        ("hello", {}, "messages is 'hello'; expected a list of objects"),
        ([{"role": object()}], {}, r"messages\[0\].role is <object .*; expected what JSON has"),
        ([{1: "x"}], {}, r"messages\[0\]: an object has a key that is no text"),
        ([USER], {"tools": [len]}, r"tools\[0\] is <built-in function len>; expected what JSON"),
        ([USER], {"documents": ["x"]}, r"documents is \['x'\]; expected a list of objects"),
        ([USER], {"continue_final_message": True}, "is no variable of a chat template: write"),
        ([USER], {"chat_template": "x"}, r"no chat template 'x'; name one of \['default'\] as"),
    ],
)
def test_values_that_no_chat_has(
    messages: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tokenizer = runtime_form(wrap(byte_level()), tmp_path, {"default": "{{ messages | length }}"})
    with pytest.raises(lr.InputError, match=message):
        tokenizer.render_chat(messages, **options)


def test_deep_and_large_values(renderer: TemplateRenderer, tmp_path: Path) -> None:
    tokenizer = runtime_form(wrap(byte_level()), tmp_path, {"default": "x"})
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(lr.InputError, match="objects and lists more than 64 deep; flatten them"):
        tokenizer.render_chat([{"content": deep}])
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(lr.InputError, match="objects and lists more than 64 deep"):
        tokenizer.render_chat([{"content": circle}])
    with pytest.raises(lr.InputError, match="expected at most 64 MiB: shorten the chat"):
        renderer.render("", {"text": "x" * 2**26})


def test_values_of_other_libraries_are_plain(tmp_path: Path) -> None:
    class Text(str):
        pass

    template = "{{ messages[0].n }} {{ messages[0].yes }} {{ messages[0].text }}"
    tokenizer = runtime_form(wrap(byte_level()), tmp_path, {"default": template})
    message = {"n": np.int64(3), "yes": np.bool_(False), "text": Text("t"), "none": None}
    assert tokenizer.render_chat([message]) == "3 False t"
    tokenizer.close()


def test_named_templates(tmp_path: Path) -> None:
    templates = {"default": "D", "tool_use": "T", "rag": "R{{ documents | length }}"}
    tokenizer = runtime_form(wrap(byte_level()), tmp_path, templates)
    assert tokenizer.render_chat([USER]) == "D"
    assert tokenizer.render_chat([USER], tools=[WEATHER]) == "T"
    assert tokenizer.render_chat([USER], tools=[]) == "T"
    documents = [{"title": "a", "text": "b"}]
    assert tokenizer.render_chat([USER], None, documents, chat_template="rag") == "R1"
    tokenizer.close()


def test_text_that_cannot_be_encoded(tmp_path: Path) -> None:
    tokenizer = runtime_form(wrap(byte_level()), tmp_path)
    with pytest.raises(lr.InputError, match="a text cannot be encoded"):
        tokenizer.encode("\ud800")
    with pytest.raises(lr.InputError, match="the tokenizer has no chat template; give text"):
        tokenizer.encode_chat([USER])
