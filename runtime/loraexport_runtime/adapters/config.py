"""adapter_config.json -> its fields, checked: every one is read, without effect, or refused.

Names and meaning follow peft.LoraConfig. `FIELDS` says of each field what becomes of it; a field
that it does not know is an error, because it may change the mathematics.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contract.foreign import parse_json
from ..errors import AdapterConfigError, quoted
from .files import CONFIG_FILE, AdapterFiles
from .patterns import check_patterns

MAX_FACTOR = 2**53
"""Of a number in a config: above it an integer is not exact as a float."""
MAX_RANK = 2**20
"""Far above any layer's width, which bounds a rank."""
MAX_SAVED = 256
"""Names in modules_to_save; each is compared with every tensor's name."""

_READ = "read"
_NO_EFFECT = "no effect"
_SELECTS = "read: it selects modules, and the tensors have to be of those"
_TRAINING = "no effect: it matters in training only"


@dataclass(frozen=True)
class Refused:
    """A field that changes the mathematics in a way that is not supported, unless neutral."""

    reason: str
    neutral: tuple[Any, ...] = (None, False)


FIELDS: dict[str, str | Refused] = {
    "peft_type": _READ,
    "r": _READ,
    "lora_alpha": _READ,
    "use_rslora": _READ,
    "rank_pattern": _READ,
    "alpha_pattern": _READ,
    "init_lora_weights": _READ,
    "use_dora": _READ,
    "lora_bias": _READ,
    "modules_to_save": _READ,
    "task_type": _NO_EFFECT,
    "auto_mapping": "no effect: it names the class of the model, which is held to the base's",
    "peft_version": _NO_EFFECT,
    "base_model_name_or_path": _NO_EFFECT,
    "revision": _NO_EFFECT,
    "inference_mode": _NO_EFFECT,
    "megatron_core": _NO_EFFECT,
    "qalora_group_size": "no effect without use_qalora",
    "fan_in_fan_out": "no effect: A and B are stored alike for Linear and Conv1D",
    "runtime_config": "no effect: it places tensors on devices",
    "target_modules": _SELECTS,
    "exclude_modules": _SELECTS,
    "layers_to_transform": _SELECTS,
    "layers_pattern": _SELECTS,
    "lora_dropout": _TRAINING,
    "velora_config": _TRAINING,
    "loftq_config": "no effect: init_lora_weights says whether LoftQ was used",
    "eva_config": _TRAINING,
    "corda_config": "no effect: init_lora_weights says whether CorDA was used",
    "lora_ga_config": "no effect: init_lora_weights says whether LoRA-GA was used",
    "bias": Refused(
        "it trains the bias of every module, of LayerNorms too; 'lora_only' is supported",
        ("none", "lora_only"),
    ),
    "trainable_token_indices": Refused("single token embeddings were trained", (None, [], {})),
    "target_parameters": Refused("LoRA sits on bare parameters, not on modules", (None, [])),
    "layer_replication": Refused("the base's layers are repeated", (None, [])),
    "alora_invocation_tokens": Refused("the adapter acts after given tokens only", (None, [])),
    "megatron_config": Refused("LoRA sits on Megatron's parallel layers"),
    "use_qalora": Refused("QALoRA pools the inputs of A"),
    "use_bdlora": Refused("BD-LoRA stores block-diagonal factors"),
    "arrow_config": Refused("Arrow routes between experts at run time"),
    "kasa_config": Refused("KaSA truncates the base weight and scales between A and B"),
    "monteclora_config": Refused("MonteCLoRA samples its weights"),
    "ensure_weight_tying": Refused("one adapter serves two tied modules"),
}
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
_CONVERTIBLE_INITS = ("pissa", "corda", "olora", "lora_ga")


def read_lora_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter directory's config; see `check_lora_config`."""
    return check_lora_config(AdapterFiles(path))


def check_lora_config(files: AdapterFiles) -> dict[str, Any]:
    """The fields of an adapter's config, PEFT's defaults for what it leaves out.

    Raises:
        AdapterConfigError: a field is unknown, unsupported or malformed.
    """
    file = files.path / CONFIG_FILE
    config = parse_json(files.read_config(), file, AdapterConfigError)
    if not isinstance(config, dict):
        raise AdapterConfigError(f"{file}: expected a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise AdapterConfigError(
            f"{file}: peft_type is {quoted(config.get('peft_type'))}; only 'LORA' is supported"
        )
    for key, value in config.items():
        rule = FIELDS.get(key)
        if rule is None and value is None:
            continue  # peft's null: a feature of another version that is not used
        if rule is None:
            raise AdapterConfigError(
                f"{file}: unknown field {quoted(key)} = {quoted(value)}. It may change the"
                " mathematics, so it is not ignored: remove it if it has no effect, or ask for"
                " its support"
            )
        if isinstance(rule, Refused) and not any(
            value is neutral or value == neutral for neutral in rule.neutral
        ):
            raise AdapterConfigError(
                f"{file}: {key} = {quoted(value)} is not supported: {rule.reason}. Retrain without"
                " it, or merge this adapter into a base of its own"
            )
    _check_init(config.get("init_lora_weights", True), file)
    defaults: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": [],
    }
    for key, default in defaults.items():
        if config.get(key) is None:
            config[key] = default
    _check_types(config, file)
    check_patterns(_patterns(config), file)
    if config["use_dora"] and config["lora_bias"]:
        raise AdapterConfigError(
            f"{file}: use_dora and lora_bias are both true, which peft itself refuses; config and"
            " weights are not of one training"
        )
    return config


def _check_init(init: object, file: Path) -> None:
    """Refuse what does not leave the base alone: the adapter is no plain `W + s B A` then."""
    if init in _PLAIN_INITS:
        return
    name = str(init).lower()
    if name.startswith(_CONVERTIBLE_INITS):
        raise AdapterConfigError(
            f"{file}: init_lora_weights = {quoted(init)} changes the base weights themselves, so"
            " this adapter is wrong on the original base. With peft save it converted:"
            " model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial),"
            " where initial is the folder of the adapter as it was before training"
        )
    if name == "loftq":
        raise AdapterConfigError(
            f"{file}: init_lora_weights = 'loftq' changes the base weights themselves, so this"
            " adapter is wrong on the original base. peft has no conversion for it: merge it into"
            " its quantized base (model.merge_and_unload()), or retrain without it"
        )
    raise AdapterConfigError(
        f"{file}: init_lora_weights = {quoted(init)} is not supported; supported are true, false,"
        " 'gaussian', 'orthogonal' and 'eva', which leave the base weights alone. peft's"
        " conversion (path_initial_model_for_weight_conversion) is for PiSSA, CorDA, OLoRA and"
        " LoRA-GA; retrain this one with init_lora_weights=True"
    )


def _check_types(config: dict[str, Any], file: Path) -> None:
    def is_number(value: object) -> bool:
        if isinstance(value, int):
            return not isinstance(value, bool) and abs(value) <= MAX_FACTOR
        return isinstance(value, float) and math.isfinite(value)

    def is_rank(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK

    def are_names(value: object) -> bool:
        is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return value is None or isinstance(value, str) or is_list

    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    checks = {
        **{
            key: (are_names(config.get(key)), "a text or a list of texts")
            for key in ("target_modules", "exclude_modules", "layers_pattern")
        },
        "layers_to_transform": (
            layers is None or all(type(number) is int for number in numbers),
            "a number or a list of numbers",
        ),
        "r": (is_rank(config["r"]), "a positive integer"),
        "lora_alpha": (
            is_number(config["lora_alpha"]),
            "a finite number",
        ),
        "use_rslora": (isinstance(config["use_rslora"], bool), "true or false"),
        "use_dora": (isinstance(config["use_dora"], bool), "true or false"),
        "lora_bias": (isinstance(config["lora_bias"], bool), "true or false"),
        "modules_to_save": (
            isinstance(config["modules_to_save"], list)
            and len(config["modules_to_save"]) <= MAX_SAVED
            and all(isinstance(name, str) and name for name in config["modules_to_save"]),
            "a list of module names",
        ),
        "rank_pattern": (
            isinstance(config["rank_pattern"], dict)
            and all(map(is_rank, config["rank_pattern"].values())),
            "an object of positive integers",
        ),
        "alpha_pattern": (
            isinstance(config["alpha_pattern"], dict)
            and all(map(is_number, config["alpha_pattern"].values())),
            "an object of finite numbers",
        ),
    }
    for key, (ok, expected) in checks.items():
        if not ok:
            raise AdapterConfigError(
                f"{file}: {key}: expected {expected}, got {quoted(config.get(key))}"
            )


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Field and text of every regular expression in a config."""
    for key in ("rank_pattern", "alpha_pattern"):
        yield from ((key, pattern) for pattern in config[key])
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, list) and key == "layers_pattern":
            yield from ((key, pattern) for pattern in value if isinstance(pattern, str))


def trained_class(config: dict[str, Any]) -> str | None:
    """`auto_mapping`: the class that the adapter was trained on, and the module of it."""
    mapping = config.get("auto_mapping")
    if not isinstance(mapping, dict):
        return None
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    return f"{library}.{name}" if isinstance(library, str) and isinstance(name, str) else None
