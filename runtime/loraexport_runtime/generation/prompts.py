"""Prompts of any form -> their tokens, checked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or the messages of a chat: `[{"role": "user", "content": …}]`."""


class PromptReader:
    """A tokenizer of onnxruntime-genai, and what a prompt of its model may hold."""

    def __init__(self, tokenizer: Any, vocabulary: int, pad: int, context: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._pad = pad
        self._context = context
        self._has_template = self._finds_template()

    def read(self, prompts: Sequence[Prompt], steps: int, chat: bool) -> list[list[int]]:
        """The tokens of every prompt.

        Args:
            steps: how many tokens follow at most.
            chat: a text is the user's message of the chat template, if there is one.

        Raises:
            InputError: a prompt cannot be run.
        """
        tokens = [self._encode(prompt, index, chat) for index, prompt in enumerate(prompts)]
        longest = max(map(len, tokens))
        if longest + steps > self._context:
            raise InputError(
                f"a prompt of {longest} tokens and {steps} new ones are more than the model's"
                f" {self._context}; shorten the prompt, or lower max_new_tokens"
            )
        return tokens

    def _encode(self, prompt: Prompt, index: int, chat: bool) -> list[int]:
        if not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], Mapping)):
            tokens = [int(token) for token in prompt]  # type: ignore[arg-type]
        else:
            text = self._text(prompt, index, chat)
            tokens = [int(token) for token in self._tokenizer.encode(text)]
        if not tokens:
            raise InputError(f"prompts[{index}] has no tokens")
        if min(tokens) < 0 or max(tokens) >= self._vocabulary or self._pad in tokens:
            raise InputError(
                f"prompts[{index}]: tokens range from {min(tokens)} to {max(tokens)}; expected 0 to"
                f" {self._vocabulary - 1} without {self._pad}, which stands for padding"
            )
        return tokens

    def _text(self, prompt: Any, index: int, chat: bool) -> str:
        if isinstance(prompt, str) and not (chat and self._has_template):
            return prompt
        if not self._has_template:
            raise InputError(
                f"prompts[{index}] is a chat, but the tokenizer has no chat template; give text"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._apply_template(list(messages))

    def _apply_template(self, messages: list[Any]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages=json.dumps(messages), add_generation_prompt=True
        )
        return text

    def _finds_template(self) -> bool:
        try:
            self._apply_template([{"role": "user", "content": "x"}])
        except Exception:  # onnxruntime-genai has no way to ask
            return False
        return True
