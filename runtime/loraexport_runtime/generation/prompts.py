"""Prompts of any form -> their tokens, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .options import Options
from .request import read_tokens
from .text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a chat: `[{"role": "user", "content": …}]`."""


class PromptReader:
    """A tokenizer, and what a prompt of its model may hold."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def read(self, prompts: Sequence[Prompt], options: Options) -> list[list[int]]:
        """The tokens of every prompt.

        Raises:
            BatchError: a prompt cannot be run.
        """
        every = []
        for index, prompt in enumerate(prompts):
            tokens = self._encode(prompt, index, options)
            every.append(read_tokens(f"prompts[{index}]", tokens, self._vocabulary))
            if not every[-1]:
                raise InputError(f"prompts[{index}] has no tokens")
        return every

    def _encode(self, prompt: Any, index: int, options: Options) -> Any:
        """The tokens of a text or a chat; whatever else it is."""
        has_template = self._tokenizer.has_chat_template
        if isinstance(prompt, str):
            if not (options.chat and has_template):
                return self._tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        elif not (isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)):
            return prompt
        if not has_template:
            raise InputError(
                f"prompts[{index}] is a chat, but the tokenizer has no chat template; give text"
            )
        arguments = options.template_arguments or {}
        return self._tokenizer.encode_chat(prompt, options.tools, options.documents, **arguments)


def require_prompts(prompts: Any) -> None:
    """Raise InputError unless they are a list of prompts."""
    if isinstance(prompts, str):
        raise InputError("prompts is one text; expected a list of prompts")
    if isinstance(prompts, bytes | Mapping) or not hasattr(prompts, "__len__"):
        raise InputError(
            f"prompts is of type {type(prompts).__name__}; expected a list of prompts, each a text,"
            " token ids, or the messages of a chat"
        )
