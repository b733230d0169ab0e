"""The config files of sentence-transformers: every key is computed, without effect, or refused.

A key counts as without effect if encode() or predict() give the same numbers, from the same token
ids, whatever its value is.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loraexport_runtime.contract.foreign import has_file, read_json, value_of
from loraexport_runtime.errors import quoted

from ...errors import BaseModelError
from ..config_file import ConfigFile

MODULES_FILE = "modules.json"
MODEL_CONFIG = "config_sentence_transformers.json"
_LIBRARY = "sentence_transformers"
_MODULE_KEYS = ("idx", "name", "path", "type", "kwargs")
_TEXT_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""By the kind of model, as the library named the file once; the first that is there counts."""
_TEXT_KEYS = ("max_seq_length", "do_lower_case", "unpad_inputs")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    # Of the model: how attention is computed, how wide numbers are, what no output comes from.
    "model_args": ("attn_implementation", "torch_dtype", "dtype", "add_pooling_layer"),
    # Of the tokenizer: the side counts for the mask alone.
    "tokenizer_args": ("padding_side", "model_max_length"),
    "config_args": ("use_cache",),
}
"""Arguments that are stored for transformers' own functions -> those without an effect."""
_RENAMED = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs"}
_RENAMED |= {"config_args": "config_kwargs"}
_MODEL_KEYS = (
    *("__version__", "prompts", "default_prompt_name", "similarity_fn_name", "model_type"),
    *("truncate_dim", "activation_fn", "requirements"),
)


@dataclass(frozen=True)
class ModuleEntry:
    """A module of modules.json: what it is, and the folder of its files."""

    kind: str
    """The name of its class in sentence-transformers, such as `Pooling`."""
    folder: Path


def read_modules(directory: Path) -> list[ModuleEntry]:
    """The modules in the order in which they are computed.

    Raises:
        BaseModelError: the file is damaged, or names what is not of the library.
    """
    file = directory / MODULES_FILE
    listed = read_json(file, BaseModelError)
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise BaseModelError(f"{file}: expected a list of objects; download it again")
    modules = []
    for module in listed:
        path = value_of(module, "path", str, file, BaseModelError)
        inner = PurePosixPath(path)
        if inner.is_absolute() or ".." in inner.parts:
            raise BaseModelError(
                f"{file}: path {quoted(path)} leaves the folder; download it again"
            )
        ConfigFile(file, module).require_known(_MODULE_KEYS)
        if module.get("kwargs"):
            raise BaseModelError(
                f"{file}: kwargs is {quoted(module['kwargs'])}: its forward takes more than texts,"
                " which a graph has no input for"
            )
        name = value_of(module, "type", str, file, BaseModelError)
        package, _, kind = name.rpartition(".")
        if package.split(".")[0] != _LIBRARY:
            raise BaseModelError(
                f"{file}: type {quoted(name)} is code of the model's own, which is never run; only"
                f" modules of {_LIBRARY} are computed"
            )
        modules.append(ModuleEntry(kind, directory / inner))
    return modules


def read_text_config(folder: Path) -> ConfigFile:
    """What a Transformer module keeps of itself, by whatever name; nothing if there is none."""
    names = [name for name in _TEXT_CONFIGS if has_file(folder / name)]
    return ConfigFile.read(folder / (names or _TEXT_CONFIGS)[0])


def check_text_config(config: ConfigFile, task: str, method_output: str, output: str) -> None:
    """Refuse what the graph of a task does not compute.

    Args:
        task: the library's own name for it.
        method_output: what is taken of transformers' output.
        output: the library's name for that.
    """
    arguments = {**_ARGUMENTS, **{_RENAMED[key]: names for key, names in _ARGUMENTS.items()}}
    neutral = {
        "transformer_task": (task,),
        "module_output_name": (output,),
        "processing_kwargs": ({},),
        "query_length": (),
        "document_length": (),
        "query_expansion": (),
        "tokenizer_name_or_path": (),
    }
    config.require_known((*_TEXT_KEYS, *arguments, *neutral, "modality_config"))
    for key, values in neutral.items():
        config.require(key, *values)
    for key, names in arguments.items():
        for name, value in config.object(key).items():
            if name not in (*names, "trust_remote_code"):  # the library itself drops that one
                raise BaseModelError(
                    f"{config.path}: {key}.{name} is {quoted(value)}, which may change what the"
                    " model gives and cannot be built; remove it if it does not"
                )
    modalities = config.object("modality_config")
    text = {"method": "forward", "method_output_name": method_output}
    if modalities and modalities.get("text") != text:
        raise BaseModelError(
            f"{config.path}: modality_config.text is {quoted(modalities.get('text'))}; only"
            f" {text} can be built"
        )


def read_model_config(directory: Path) -> ConfigFile:
    """config_sentence_transformers.json, its keys all known; nothing if there is none."""
    config = ConfigFile.read(directory / MODEL_CONFIG)
    config.require_known(_MODEL_KEYS)
    return config


def max_lengths(config: ConfigFile) -> list[int | None]:
    """Every limit that a Transformer module's file sets for a text's tokens."""
    limits = [config.number("max_seq_length")]
    for key in ("tokenizer_args", _RENAMED["tokenizer_args"]):
        arguments = ConfigFile(config.path, config.object(key))
        limits.append(arguments.number("model_max_length"))
    return limits
