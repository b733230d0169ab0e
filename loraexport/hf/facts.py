"""A Hugging Face directory's config files -> what a service has to know of the model."""

from pathlib import Path
from typing import get_args

from loraexport_runtime.contract.kinds import Facts, ProblemType

from ..errors import BaseModelError
from .config_file import ConfigFile
from .sentences.files import MODEL_CONFIG, max_lengths, read_text_config

_NO_LIMIT = 10**9
"""A tokenizer that knows no limit says 1e30."""
_OFFSET_TYPES = (
    *("camembert", "data2vec-text", "layoutlmv3", "lilt", "longformer", "luke", "markuplm"),
    *("mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Their first positions, up to the padding's own, are of no token."""
_TABLE_TYPES = (
    *("albert", "bert", "bert-generation", "big_bird", "biogpt", "clip_text_model", "convbert"),
    *("deberta", "deberta-v2", "distilbert", "electra", "ernie", "flaubert", "fnet", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "layoutlm", "megatron-bert", "mobilebert", "mra"),
    *("nystromformer", "openai-gpt", "opt", "rembert", "roc_bert", "siglip_text_model"),
    *("splinter", "squeezebert", "xlm", "yoso", *_OFFSET_TYPES),
)
"""They look positions up in a table that ends; others compute them, for texts of any length."""


def read_facts(directory: Path, root: Path | None = None, part: str | None = None) -> Facts:
    """What the files say that are there; a file that is absent says nothing.

    Args:
        root: where sentence-transformers' own files are, if not there.
        part: the key of config.json under which the model's own config is, if it is one of several.

    Raises:
        BaseModelError: a file is no JSON object, or a value is of another type than it should be.
    """
    config = ConfigFile.read(directory / "config.json")
    if part is not None:
        config = ConfigFile(config.path, config.object(part))
    text = ConfigFile(config.path, config.object("text_config"))
    sentences = ConfigFile.read((root or directory) / MODEL_CONFIG)
    prompts = sentences.texts("prompts")
    default = sentences.text("default_prompt_name")
    if default is not None and default not in prompts:
        raise BaseModelError(
            f"{sentences.path}: default_prompt_name is {default!r}, but prompts has"
            f" {', '.join(prompts) or 'none'}; correct one of them"
        )
    problem = config.text("problem_type")
    problem_types = get_args(ProblemType)
    if problem is not None and problem not in problem_types:
        raise BaseModelError(
            f"{config.path}: problem_type is {problem!r}; expected one of"
            f" {', '.join(problem_types)}"
        )
    box_positions = config.number("max_2d_position_embeddings")
    return Facts(
        max_length=_max_length(directory, config),
        vocab_size=config.number("vocab_size") or text.number("vocab_size"),
        pad_token_id=config.number("pad_token_id"),
        id2label=config.texts("id2label"),
        problem_type=problem,  # type: ignore[arg-type]
        prompts=prompts,
        default_prompt_name=default,
        max_box=None if box_positions is None else box_positions - 1,
        positions=_table_positions(config),
        type_vocab_size=config.number("type_vocab_size") or None,
    )


def _positions(config: ConfigFile) -> int | None:
    """Tokens of a text for which the config has positions."""
    positions = config.number("max_position_embeddings") or config.number("n_positions")
    if positions is None or config.text("model_type") not in _OFFSET_TYPES:
        return positions
    pad = config.number("pad_token_id")
    return positions - (1 if pad is None else pad) - 1


def _table_positions(config: ConfigFile) -> int | None:
    """The same, where a longer text has none; None: it has, as far as is known."""
    has_table = config.text("model_type") in _TABLE_TYPES
    positions = _positions(config) if has_table else None
    # DeBERTa without absolute positions has no table.
    is_relative = not config.flag("position_biased_input", default=True)
    return None if is_relative or positions is None or positions < 1 else positions


def _max_length(directory: Path, config: ConfigFile) -> int | None:
    """The least of what the model, its tokenizer and sentence-transformers allow."""
    limits = [
        _positions(config),
        ConfigFile.read(directory / "tokenizer_config.json").number("model_max_length"),
        *max_lengths(read_text_config(directory)),
    ]
    return min((limit for limit in limits if limit and 0 < limit < _NO_LIMIT), default=None)
