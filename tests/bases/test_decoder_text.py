"""What a build writes of a decoder's text, and how it compares that with transformers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from support.templates import FAMILIES
from support.tokenizers import KINDS, byte_level, metaspace, save, wrap

from loraexport.bases import decoder_text
from loraexport.bases.decoder_text import write_text
from loraexport.errors import BaseModelError, exit_code
from loraexport.hf.generation import find_generation_config, find_templates
from loraexport_runtime.contract.files import FileEntry, digest_file
from loraexport_runtime.contract.listed import ListedFiles
from loraexport_runtime.generation.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "base"


def _opened(folder: Path) -> Tokenizer:
    files = {
        file.relative_to(folder.parent).as_posix(): FileEntry(
            digest_file(file), file.stat().st_size
        )
        for file in folder.rglob("*")
        if file.is_file()
    }
    return Tokenizer.read(ListedFiles(folder.parent, files), folder.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_template_gives_equal_ids(family: str, base: Path) -> None:
    save(base, byte_level(), FAMILIES[family])
    assert write_text(base, base.parent / "out") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_tokenizer_gives_equal_ids_and_texts(kind: str, base: Path) -> None:
    save(base, KINDS[kind]())
    assert write_text(base, base.parent / "out") == {}
    opened = _opened(base.parent / "out")
    plain: Any = tf.AutoTokenizer.from_pretrained(base)
    assert not opened.has_chat_template
    assert opened.encode("hello") == plain("hello")["input_ids"]
    assert opened.templates.special_tokens == plain.special_tokens_map


def test_a_template_that_refuses_a_chat_is_told_of(base: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}x"
    )
    save(base, byte_level(), template)
    refused = write_text(base, base.parent / "out")
    assert refused.keys() == {"system", "tools"}
    assert refused["system"].endswith("refuses this chat: No system here")


def test_named_templates_and_those_of_the_config(base: Path) -> None:
    """Files of their own, and the list that older tokenizer_config.json have."""
    texts = {"default": "D{{ eos_token }}", "tool_use": "T", "rag": "R"}
    save(base, metaspace(), texts)
    assert (base / "additional_chat_templates/rag.jinja").is_file()
    write_text(base, base.parent / "out")
    opened = _opened(base.parent / "out")
    assert opened.templates.texts == texts
    assert opened.render_chat(USER) == "D</s>"
    opened.close()

    older = base.parent / "older"
    save(older, metaspace())
    config = json.loads((older / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in texts.items()]
    (older / "tokenizer_config.json").write_text(json.dumps(config))
    assert _opened(older).templates.texts == texts
    (base.parent / "older-out").mkdir()
    write_text(older, base.parent / "older-out")
    assert _opened(base.parent / "older-out").templates.texts == texts
    config["chat_template"] = "one {{ bos_token }}"
    (older / "tokenizer_config.json").write_text(json.dumps(config))
    assert _opened(older).templates.texts == {"default": "one {{ bos_token }}"}


def test_special_tokens_of_a_models_own(base: Path) -> None:
    plain = wrap(
        byte_level(),
        "{{ image_token }}{{ eos_token }}{{ turn_token }}",
        extra_special_tokens={"image_token": "<img>"},
        model_specific_special_tokens={"turn_token": "<turn>"},
    )
    plain.save_pretrained(base)
    assert write_text(base, base.parent / "out") == {}
    opened = _opened(base.parent / "out")
    assert opened.templates.special_tokens["image_token"] == "<img>"
    assert opened.render_chat(USER).startswith("<img></s>")
    opened.close()


LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "the chat 'user' .* more than 1,000,000 turns of its loops and macros"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "macros or brackets too deep"),
        ("{{ 'x' * 10**10 }}", "more than 1024 MiB of memory"),
        ("{{ 'x'.encode('idna') }}", "it needs a file"),
    ],
)
def test_a_template_without_end_is_refused(template: str, message: str, base: Path) -> None:
    """Before transformers renders it, which would not end."""
    save(base, byte_level(), template)
    with pytest.raises(BaseModelError, match=message) as caught:
        write_text(base, base.parent / "out")
    assert exit_code(caught.value) == 4


def _differ(monkeypatch: pytest.MonkeyPatch, name: str, changed: Any) -> None:
    monkeypatch.setattr(Tokenizer, name, changed)


def test_a_difference_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(base, byte_level(), "{{ messages[0].content }}{{ tools }}{{ enable_thinking }}")
    folder = base.parent / "out"
    whole = Tokenizer.render_chat

    def deaf(self: Tokenizer, messages: Any, tools: Any = None, *rest: Any, **more: Any) -> str:
        return whole(self, messages, None, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "render_chat", deaf)
        with pytest.raises(BaseModelError, match=r"the chat 'tools' \(.* becomes \[.*\] with the"):
            write_text(base, folder)
    encode = Tokenizer.encode
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda self, text, **more: [1, *encode(self, text)])
        with pytest.raises(BaseModelError, match=r"the text 'Tenants share .* becomes \[1, "):
            write_text(base, folder)
    with monkeypatch.context() as patch:
        patch.setattr(decoder_text.TextStream, "finish", lambda self: "")
        with pytest.raises(BaseModelError, match=r"the text of the tokens \[.*\] becomes '"):
            write_text(base, folder)
    write_text(base, folder)


def test_what_one_side_alone_refuses_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(base, byte_level(), "{{ messages[0].content }}")

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(tf.PreTrainedTokenizerFast, "apply_chat_template", refuse)
        with pytest.raises(BaseModelError, match="is refused by transformers alone: not today"):
            write_text(base, base.parent / "out")
    monkeypatch.setattr(decoder_text, "_plain_ids", lambda *_: [1])
    (base / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(BaseModelError, match="which transformers takes: the chat template refuses"):
        write_text(base, base.parent / "out")


def test_the_date_may_change_between_two_renderings(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(base, byte_level(), "{{ strftime_now('%Y-%m-%d') }}")
    render, days = Tokenizer.render_chat, iter(["1999-12-31"] + ["2000-01-01"] * 99)
    today: list[str] = []

    def write(*arguments: Any, **more: Any) -> str:
        render(*arguments, **more)
        today.append(next(days))
        return today[-1]

    monkeypatch.setattr(Tokenizer, "render_chat", write)
    plain: Any = tf.AutoTokenizer.from_pretrained(base)
    monkeypatch.setattr(decoder_text, "_plain_ids", lambda *_: plain.encode("2000-01-01"))
    assert write_text(base, base.parent / "out") == {}
    assert len(today) == len(decoder_text.CHATS) + 1


def test_generation_config_is_carried_or_refused(base: Path) -> None:
    save(base, byte_level())
    assert find_generation_config(base) is None
    file = base / "generation_config.json"
    file.write_text('{"do_sample": true, "top_k": 7}')
    write_text(base, base.parent / "out")
    assert json.loads((base.parent / "out/generation_config.json").read_text())["top_k"] == 7
    for text, message in (
        ('{"begin_suppress_tokens": [3]}', "begin_suppress_tokens is .*, which changes the tokens"),
        ("[]", "expected an object, got a list"),
        ("{", "not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(BaseModelError, match=message) as caught:
            write_text(base, base.parent / "out")
        assert exit_code(caught.value) == 4


def test_files_that_are_none_are_not_waited_for(base: Path, tmp_path: Path) -> None:
    save(base, byte_level(), {"default": "D", "rag": "R"})
    assert [file.name for file in find_templates(base)] == ["chat_template.jinja", "rag.jinja"]
    more = base / "additional_chat_templates"
    os.mkfifo(more / "x.jinja")
    with pytest.raises(BaseModelError, match=r"x\.jinja: not a regular file"):
        write_text(base, tmp_path / "out")
    (more / "x.jinja").unlink()
    (more / "x.jinja").symlink_to("/etc/hostname")
    with pytest.raises(BaseModelError, match=r"x\.jinja: a link out of the base's folder"):
        write_text(base, tmp_path / "out")
    (more / "x.jinja").unlink()
    (more / "x.jinja").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(BaseModelError, match=r"x\.jinja: more than 1 MiB, which no chat template"):
        write_text(base, tmp_path / "out")


def test_a_tokenizer_that_cannot_be_read(base: Path) -> None:
    save(base, byte_level())
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match="transformers cannot read the tokenizer: "):
        write_text(base, base.parent / "out")
