"""The text of a decoder's artifact: tokenizer, chat templates and defaults, compared with
transformers before anything is published.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from loraexport_runtime.contract.files import FileEntry, digest_file
from loraexport_runtime.contract.listed import ListedFiles
from loraexport_runtime.errors import ArtifactError, ChatTemplateError, InputError, quoted
from loraexport_runtime.generation.text.stream import TextStream
from loraexport_runtime.generation.text.tokenizer import Tokenizer

from ..errors import BaseModelError
from ..hf.generation import find_generation_config, find_templates
from ..hf.quiet import quiet_models
from ..hf.tokenizer import TEXTS

_NUM_IDS, _MOST_IDS = 24, 60
"""Sequences of random ids that are decoded, and how long they are at most."""


@dataclass(frozen=True)
class Chat:
    """A chat on which a template is compared."""

    name: str
    messages: Sequence[dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place: <now> & 'later'.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
_CALL = {"name": "weather", "arguments": {"place": "Zürich", "days": 2}}
_USER = _said("user", "How warm is it?")
CHATS = (
    Chat("user", [_USER]),
    Chat("system", [_said("system", "Answer in one word.\n"), _USER]),
    Chat("history", [_USER, _said("assistant", " Warm. "), _said("user", "Sure?")]),
    Chat(
        "thought",
        [_USER, _said("assistant", "<think>\nIt is May.\n</think>\n\nWarm."), _said("user", "So?")],
    ),
    Chat("no thinking", [_USER], {"enable_thinking": False}),
    Chat("tools", [_said("system", "Be brief."), _USER], {"tools": [_TOOL]}),
    Chat(
        "a tool's result",
        [
            _USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "id": "call00001", "function": _CALL}],
            },
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "21"},
        ],
        {"tools": [_TOOL]},
    ),
    Chat("documents", [_USER], {"documents": [{"title": "May", "text": "It was warm."}]}),
    Chat("unicode", [_said("user", "naïve 日本語 한국어 🙂\u200d👩 <b> \u00a0\ttab\r\n'quote\"")]),
)
"""The kinds of chats that published templates tell apart."""


def write_text(directory: Path, folder: Path) -> dict[str, str]:
    """Write what the runtime needs for texts into a decoder's folder, and compare it.

    Args:
        directory: the base.
        folder: of the artifact, for onnxruntime-genai.

    Returns:
        The chats that the template refuses, here as in transformers, and why.

    Raises:
        BaseModelError: a file is damaged; a text, a chat or ids become something else than in
            transformers; or a template goes past its bounds.
    """
    find_templates(directory)
    defaults = find_generation_config(directory)
    if defaults is not None:
        shutil.copyfile(defaults, folder / defaults.name)
    with quiet_models():
        plain = _read_tokenizer(directory)
        plain.save_pretrained(folder)
        return _compare(directory, plain, _open(folder))


def _read_tokenizer(directory: Path) -> Any:
    try:
        read = transformers.AutoTokenizer.from_pretrained
        tokenizer: Any = read(directory, trust_remote_code=False)
    except Exception as error:  # of whatever reads this kind of tokenizer
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise BaseModelError(
            f"{directory}: transformers cannot read the tokenizer: {said}; save it there again"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise BaseModelError(
            f"{directory}: its {type(tokenizer).__name__} has no fast form in transformers, which"
            " the runtime needs; save a fast tokenizer there"
        )
    return tokenizer


def _open(folder: Path) -> Tokenizer:
    """The tokenizer as a session will open it."""
    entries = {
        file.relative_to(folder.parent).as_posix(): FileEntry(
            digest_file(file), file.stat().st_size
        )
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".json", ".jinja")
    }
    try:
        return Tokenizer.read(ListedFiles(folder.parent, entries), folder.name)
    except ArtifactError as error:
        raise BaseModelError(f"the tokenizer as it was saved cannot be opened: {error}") from error


def _compare(directory: Path, plain: Any, tokenizer: Tokenizer) -> dict[str, str]:
    try:
        _compare_texts(directory, plain, tokenizer)
        if not tokenizer.has_chat_template:
            return {}
        refused = {}
        for chat in CHATS:
            why = _compare_chat(directory, chat, plain, tokenizer)
            if why is not None:
                refused[chat.name] = why
        return refused
    finally:
        tokenizer.close()


def _compare_texts(directory: Path, plain: Any, tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids, wanted = tokenizer.encode(text), plain(text)["input_ids"]
        _require_same(directory, f"the text {text!r}", ids, wanted)
    draw = random.Random(0)
    for _ in range(_NUM_IDS):
        ids = [draw.randrange(len(plain)) for _ in range(draw.randrange(1, _MOST_IDS))]
        wanted = plain.decode(ids, skip_special_tokens=True)
        stream = TextStream(tokenizer)
        streamed = "".join([*map(stream.push, ids), stream.finish()])
        for text in (tokenizer.decode(ids), streamed):
            _require_same(directory, f"the text of the tokens {ids}", text, wanted)


def _compare_chat(directory: Path, chat: Chat, plain: Any, tokenizer: Tokenizer) -> str | None:
    """None; or why the template refuses a chat, here and in transformers.

    What is rendered here has ended within its bounds, so that it ends in transformers too.
    """
    what = f"the chat {chat.name!r} ({quoted(chat.messages)})"
    try:
        ids = tokenizer.encode_chat(chat.messages, **chat.arguments)
    except (ChatTemplateError, InputError) as error:
        if getattr(error, "is_past_bounds", False):
            raise BaseModelError(
                f"{directory}: {what}: {error}; correct the chat template, or remove it"
            ) from error
        try:
            _plain_ids(chat, plain)
        except Exception:  # of whatever the template does
            return str(error)
        raise BaseModelError(f"{directory}: {what}, which transformers takes: {error}") from error
    try:
        wanted = _plain_ids(chat, plain)
        if ids != wanted:  # the date or the time, that a template may write, has changed
            ids = tokenizer.encode_chat(chat.messages, **chat.arguments)
    except Exception as error:
        raise BaseModelError(
            f"{directory}: {what} is refused by transformers alone: {error}"
        ) from error
    _require_same(directory, what, ids, wanted)
    return None


def _plain_ids(chat: Chat, plain: Any) -> list[int]:
    ids: list[int] = plain.apply_chat_template(
        chat.messages, add_generation_prompt=True, return_dict=False, **chat.arguments
    )
    return ids


def _require_same(directory: Path, what: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise BaseModelError(
            f"{directory}: {what} becomes {quoted(value)} with the tokenizers library alone, and"
            f" {quoted(wanted)} in transformers {transformers.__version__}, so the artifact would"
            " read and write something else; save the tokenizer there again with this version"
        )
