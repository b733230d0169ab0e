"""The tokenizer of a decoder's folder: texts and chats -> ids, and ids -> text.

All of it gives what transformers gives for the same files, which the build has compared.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ...contract.listed import ListedFiles
from ...errors import ArtifactError, InputError, ProviderError
from .chat import ChatTemplates
from .cleaning import clean
from .files import TOKENIZER, read_config, read_listed
from .renderer import TemplateRenderer


class Tokenizer:
    """Ids for texts and chats, and text for ids.

    Threads: any may call.
    """

    def __init__(self, content: bytes, config: Mapping[str, Any], templates: ChatTemplates) -> None:
        """Make it of the content of tokenizer.json and of the values of tokenizer_config.json.

        Raises:
            ProviderError: the tokenizers library is not installed.
            ValueError: the content is no tokenizer.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ProviderError(
                "generation needs tokenizers: pip install 'loraexport-runtime[generation]'"
            ) from error
        try:
            self._backend: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(str(error)) from error
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = config.get("split_special_tokens") is True
        self.layout: dict[str, Any] = _layout(content)
        """The parts of tokenizer.json by which ids become text."""
        is_bpe = type(self._backend.model).__name__ == "BPE"
        keys = ("clean_up_tokenization_spaces",) + ((_FORCED,) if is_bpe else ())
        self.cleans_up = all(config.get(key) is True for key in keys)
        """Spaces ahead of punctuation are taken out of a text."""
        self.templates = templates
        self._renderer = TemplateRenderer()

    @classmethod
    def read(cls, files: ListedFiles, folder: str) -> Self:
        """The tokenizer of a folder of an artifact, its files held to their digests.

        Raises:
            ArtifactError: a file is missing, damaged or no tokenizer's.
            ProviderError: the tokenizers library is not installed.
        """
        config, templates = read_config(files, folder)
        content = read_listed(files, f"{folder}/{TOKENIZER}")
        try:
            return cls(content, config, templates)
        except ValueError as error:
            raise ArtifactError(
                f"{files.folder / folder / TOKENIZER}: no tokenizer that the tokenizers library"
                f" reads: {error}; install the version that the manifest's tools have, or build"
                " the artifact again"
            ) from error

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be encoded."""
        return bool(self.templates.texts)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            add_special_tokens: also those that the tokenizer puts around a text (BOS), which a
                chat template writes itself.

        Raises:
            InputError: it is no text that can be encoded.
        """
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # half a surrogate pair, or what the tokenizer has no token for
            raise InputError(f"a text cannot be encoded: {error}; give another") from error
        return list(encoding.ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """The ids of a chat, the beginning of the answer with them.

        Args:
            messages: `[{"role": "user", "content": …}, …]`, with whatever else the template reads.
            tools: JSON schemas of functions.
            documents: `{"title": …, "text": …}` each.
            chat_template: the name of one, of a tokenizer with several.
            template_arguments: variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the template refuses this chat, or goes past its bounds.
            InputError: there is no template, or a value that no chat has.
        """
        text = self.render_chat(messages, tools, documents, chat_template, **template_arguments)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_arguments: Any,
    ) -> str:
        """The text that `encode_chat` encodes; arguments and errors as there."""
        template = self.templates.choose(chat_template, tools is not None)
        variables = self.templates.variables(messages, tools, documents, template_arguments)
        return self._renderer.render(template, variables)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        text = self.decode_raw(ids)
        return clean(text) if self.cleans_up else text

    def decode_raw(self, ids: Sequence[int]) -> str:
        """The same before spaces are cleaned up."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token(self, index: int) -> str | None:
        """How the vocabulary writes an id; None of one that it lacks."""
        token: str | None = self._backend.id_to_token(index)
        return token

    def close(self) -> None:
        """End the process that renders templates, if there is one."""
        self._renderer.close()


_FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
"""Without it transformers cleans up no text of BPE."""


def _layout(content: bytes) -> dict[str, Any]:
    data = json.loads(content)
    return {key: data.get(key) for key in ("decoder", "added_tokens")}
