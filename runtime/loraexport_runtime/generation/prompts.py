"""Prompts of any form -> their tokens, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .options import Options
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
        return [
            self._check(self._encode(prompt, index, options), index)
            for index, prompt in enumerate(prompts)
        ]

    def _encode(self, prompt: Any, index: int, options: Options) -> list[int]:
        has_template = self._tokenizer.has_chat_template
        if isinstance(prompt, str):
            if not (options.chat and has_template):
                return self._tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        elif not (len(prompt) > 0 and isinstance(prompt[0], Mapping)):
            return [int(token) for token in prompt]
        if not has_template:
            raise InputError(
                f"prompts[{index}] is a chat, but the tokenizer has no chat template; give text"
            )
        arguments = options.template_arguments or {}
        return self._tokenizer.encode_chat(prompt, options.tools, options.documents, **arguments)

    def _check(self, tokens: list[int], index: int) -> list[int]:
        if not tokens:
            raise InputError(f"prompts[{index}] has no tokens")
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            column, token = next(
                (column, token)
                for column, token in enumerate(tokens)
                if not 0 <= token < self._vocabulary
            )
            raise InputError(
                f"prompts[{index}]: token {column} is {token}; expected 0 to {self._vocabulary - 1}"
            )
        return tokens
