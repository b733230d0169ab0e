"""generation_config.json -> how a decoder generates where a call says nothing else."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...contract.foreign import MAX_BYTES, parse_json
from ...contract.genai_config import GENAI_CONFIG, end_tokens
from ...contract.listed import ListedFiles
from ...errors import ArtifactError, LoraexportError, quoted

GENERATION_CONFIG = "generation_config.json"
MAX_NEW_TOKENS = 128
"""Where neither a call nor the config says how many."""
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "token_healing": (False,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
}
"""Keys that would change the tokens, and are not computed -> values that change nothing."""
_NO_EFFECT = frozenset(
    {"bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "random_seed"}
    # Of beams alone, of which there is one; of NaN; of several answers; of how it is computed.
    | {"early_stopping", "length_penalty", "renormalize_logits", "remove_invalid_values"}
    | {"num_return_sequences", "use_cache", "cache_implementation", "cache_config", "use_mtp"}
    | {"max_cache_len", "output_attentions", "output_hidden_states", "output_scores", "low_memory"}
    | {"output_logits", "return_dict_in_generate", "compile_config", "disable_compile"}
    | {"continuous_batching_config", "prefill_chunk_size", "return_legacy_cache"}
    | {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"}
    | {"assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size"}
    | {"assistant_early_exit", "assistant_lookbehind", "target_lookbehind"}
    | {"assistant_ensemble_weight", "_from_model_config", "transformers_version", "_commit_hash"}
)
"""The ends are in genai_config.json, as onnxruntime-genai's builder took them from here."""
_OF_SEARCH = ("past_present_share_buffer", "max_length")
"""Keys of genai_config.json's search that say how the graph is run."""


@dataclass(frozen=True)
class GenerationDefaults:
    """How a decoder generates, as its generation_config.json says, with transformers' meanings."""

    temperature: float = 0.0
    """0, of a config that does not sample: the likeliest token always."""
    top_k: int = 50
    """Of so many of the likeliest; 0: of all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Of those that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """What the logits of tokens that the prompt or the answer has are divided by (if positive)."""
    suppress_tokens: tuple[int, ...] = ()
    """None of these comes."""
    no_repeat_ngram_size: int = 0
    """So many tokens in a row do not come that prompt and answer have already; 0: any may."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """None of these comes whole."""
    max_new_tokens: int | None = None
    max_length: int | None = None
    """Tokens of a prompt and its answer together; `max_new_tokens` goes before it."""
    min_new_tokens: int = 0
    min_length: int = 0
    """Of a prompt and its answer together, before which no answer ends."""
    stop: tuple[str, ...] = ()
    """`stop_strings`: an answer ends where it has one of these."""
    ends: tuple[int, ...] = ()
    """The tokens that end an answer."""

    @classmethod
    def read(cls, files: ListedFiles, folder: str, config: Mapping[str, Any]) -> Self:
        """Those of a decoder's folder in an artifact.

        Args:
            config: its genai_config.json, whose `search` counts where there is no
                generation_config.json.

        Raises:
            ArtifactError: the file is damaged, or a key of it would change the tokens and is not
                computed.
        """
        path, ends = f"{folder}/{GENERATION_CONFIG}", end_tokens(config["model"])
        file = files.folder / path
        if path not in files:
            search = config["search"]
            values = {key: search[key] for key in search if key not in _OF_SEARCH}
            return cls.parse(values, ends, files.folder / folder / GENAI_CONFIG)
        with files.open(path) as opened:
            data = opened.read(MAX_BYTES)
        values = parse_json(data, file, ArtifactError)
        if not isinstance(values, dict):
            raise ArtifactError(f"{file}: expected an object; build the artifact again")
        return cls.parse(values, ends, file)

    @classmethod
    def parse(
        cls,
        values: Mapping[str, Any],
        ends: list[int],
        file: Path,
        error: type[LoraexportError] = ArtifactError,
    ) -> Self:
        """Those that a file's values say.

        Args:
            ends: the tokens that end an answer.

        Raises:
            error: a value is not of its type, or a key would change the tokens and is not computed.
        """
        known = {key: value for key, value in values.items() if value is not None}
        for key, value in known.items():
            if key in _OFF and value not in _OFF[key]:
                raise error(
                    f"{file}: {key} is {quoted(value)}, which changes the tokens and is not"
                    " computed; remove it, and build again"
                )
            if key not in _OFF and key not in _NO_EFFECT and key not in _KINDS:
                raise error(
                    f"{file}: unknown key {quoted(key)}, which may change the tokens; remove it,"
                    " and build again"
                )
            if key in _KINDS and not _KINDS[key][0](value):
                raise error(
                    f"{file}: {key} is {quoted(value)}; expected {_KINDS[key][1]}: correct it, and"
                    " build again"
                )
        stop = known.get("stop_strings", ())
        samples = known.get("do_sample", False)
        return cls(
            temperature=float(known.get("temperature", 1.0)) if samples else 0.0,
            top_k=known.get("top_k", cls.top_k),
            top_p=float(known.get("top_p", cls.top_p)),
            min_p=float(known.get("min_p", cls.min_p)),
            repetition_penalty=float(known.get("repetition_penalty", cls.repetition_penalty)),
            suppress_tokens=tuple(known.get("suppress_tokens", ())),
            no_repeat_ngram_size=known.get("no_repeat_ngram_size", cls.no_repeat_ngram_size),
            bad_words_ids=tuple(map(tuple, known.get("bad_words_ids", ()))),
            max_new_tokens=known.get("max_new_tokens"),
            max_length=known.get("max_length"),
            min_new_tokens=known.get("min_new_tokens", cls.min_new_tokens),
            min_length=known.get("min_length", cls.min_length),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ends=tuple(ends),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(word and _are_ids(word) for word in value)


def _are_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number of 0 or more"),
    "top_k": (_is_count, "a count"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, up to 1"),
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "suppress_tokens": (_are_ids, "a list of token ids"),
    "no_repeat_ngram_size": (_is_count, "a count"),
    "bad_words_ids": (_are_words, "a list of lists of token ids, none of them empty"),
    "max_new_tokens": (lambda value: _is_count(value) and value > 0, "a count of 1 or more"),
    "max_length": (lambda value: _is_count(value) and value > 0, "a count of 1 or more"),
    "min_new_tokens": (_is_count, "a count"),
    "min_length": (_is_count, "a count"),
    "stop_strings": (_are_texts, "a text or a list of texts, none of them empty"),
}
"""Keys that are computed: which values they may have."""
