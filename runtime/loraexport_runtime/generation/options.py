"""What a call says of how its prompts are answered, over what the model's config says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, quoted
from .request import read_count, read_stop
from .text.defaults import MAX_NEW_TOKENS, GenerationDefaults

_CHOSEN = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "suppress_tokens",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "stop",
)
"""What a request has under the same name."""
_OWN = ("messages", "tools", "documents")
"""Variables of a chat template that are arguments of their own."""


@dataclass(frozen=True)
class Options:
    """The arguments of a call, as `TextGenerator.stream` describes them; None: as the config."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    suppress_tokens: Sequence[int] | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_new_tokens: int | None = None
    seed: int | None = None
    stop: Sequence[str] | None = None
    chat: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template_arguments: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raise InputError for a value that is none."""
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("seed", 0)):
            if (value := getattr(self, name)) is not None:
                read_count(name, value, least)
        read_stop(() if self.stop is None else self.stop)
        arguments = self.template_arguments or {}
        are_variables = isinstance(arguments, Mapping) and all(
            isinstance(name, str) and name not in _OWN for name in arguments
        )
        if not are_variables:
            raise InputError(
                f"template_arguments is {quoted(arguments)}; expected variables of the chat"
                " template by name, but for messages, tools and documents: pass these by themselves"
            )

    def requests(
        self, tokens: Sequence[Sequence[int]], defaults: GenerationDefaults, context: int
    ) -> list[dict[str, Any]]:
        """What each prompt asks of the engine, as GenerationRequest names it.

        Args:
            context: tokens of a prompt and its answer that the engine holds at most.

        Raises:
            InputError: a prompt leaves too little room for its answer.
        """

        def chosen(name: str) -> Any:
            value = getattr(self, name)
            return getattr(defaults, name) if value is None else value

        common = {name: chosen(name) for name in _CHOSEN}
        requests = []
        limits = self.limits(tokens, defaults, context)
        for row, (prompt, limit) in enumerate(zip(tokens, limits, strict=True)):
            least = self.min_new_tokens
            if least is None:
                least = defaults.min_new_tokens or max(0, defaults.min_length - len(prompt))
                least = min(least, limit)
            # Rows with one prompt and one seed draw tokens of their own.
            seed = None if self.seed is None else int(self.seed) + (row << 32)
            more = {"max_tokens": limit, "min_tokens": least, "seed": seed}
            requests.append(common | more)
        return requests

    def limits(
        self, tokens: Sequence[Sequence[int]], defaults: GenerationDefaults, context: int
    ) -> list[int]:
        """How many tokens may follow each prompt.

        Raises:
            InputError: a prompt leaves too little room for them.
        """
        limit = self.max_new_tokens or defaults.max_new_tokens
        whole = None if limit else defaults.max_length
        limits = []
        for index, prompt in enumerate(tokens):
            count = int(limit or MAX_NEW_TOKENS)
            if whole is not None:
                count = min(count, whole - len(prompt))
            if count < 1:
                raise InputError(
                    f"prompts[{index}] has {len(prompt)} tokens, and generation_config.json allows"
                    f" {whole} with its answer; pass max_new_tokens, or shorten the prompt"
                )
            if len(prompt) + count > context:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens and {count} new ones are more than the"
                    f" {context} that this generator holds for each; shorten the prompt, or lower"
                    " max_new_tokens"
                )
            limits.append(count)
        return limits
