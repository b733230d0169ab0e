"""A sentence-transformers directory -> the tail that a task has behind its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from loraexport_runtime.adapters.tensor_files import TensorInfo
from loraexport_runtime.contract.foreign import has_file
from loraexport_runtime.errors import quoted

from ...errors import BaseModelError
from ..checkpoint import read_checkpoint
from ..config_file import ConfigFile
from .files import (
    MODEL_CONFIG,
    MODULES_FILE,
    ModuleEntry,
    check_text_config,
    read_model_config,
    read_modules,
    read_text_config,
)
from .tail import Activation, Dense, LayerNorm, Mode, Normalize, Scores, Sentences, Step, Tail

_FLAGS: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How a mode was named before 5.4, in the order in which several are put side by side."""
_SCORES: tuple[Activation, ...] = ("Identity", "Sigmoid")
"""Activations under which the lowest logit, which stands for a label that a head lacks, is one."""
_WIDTHS = ("embedding_dimension", "word_embedding_dimension")
_VECTOR = "sentence_embedding"
_STEPS = ("Dense", "LayerNorm", "Normalize", "Dropout")


def find_sentence_task(directory: Path) -> str:
    """The task of a directory with a modules.json."""
    if read_model_config(directory).text("model_type") == "CrossEncoder":
        return "sequence-classification"
    return "sentence-embedding"


def read_tail(directory: Path, task: str) -> Tail | None:
    """What a task has behind its model; None for nothing.

    Raises:
        BaseModelError: a file is missing or damaged, or says what is not computed, by name.
        WeightsError: a module's weights are pickled or damaged.
    """
    if task == "sentence-embedding":
        if not has_file(directory / MODULES_FILE):
            raise _no_pooling(directory)
        return _read_sentences(directory)
    return _read_scores(directory) if task == "sequence-classification" else None


def _read_sentences(directory: Path) -> Sentences:
    modules = read_modules(directory)
    kinds = [module.kind for module in modules]
    unsupported = [kind for kind in kinds if kind not in ("Transformer", "Pooling", *_STEPS)]
    if unsupported:
        raise BaseModelError(
            f"{directory}: modules.json lists {quoted(unsupported[0])}, which cannot be built; only"
            f" Transformer, Pooling, {', '.join(_STEPS)} can"
        )
    if "Pooling" not in kinds:
        raise _no_pooling(directory)
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") > 1:
        raise BaseModelError(
            f"{directory}: modules.json lists {', '.join(kinds)}; expected Transformer, Pooling and"
            f" then any of {', '.join(_STEPS)}"
        )
    config = read_model_config(directory)
    config.require("model_type", "SentenceTransformer")
    transformer, pooling, *behind = modules
    text = read_text_config(transformer.folder)
    check_text_config(text, "feature-extraction", "last_hidden_state", "token_embeddings")
    file = ConfigFile.read(pooling.folder / "config.json", required=True)
    file.require_known((*_WIDTHS, *_FLAGS, "pooling_mode", "include_prompt"))
    modes = _read_modes(file)
    width = file.size(next((key for key in _WIDTHS if key in file.values), _WIDTHS[0]))
    truncate = config.size("truncate_dim") if config.number("truncate_dim") is not None else None
    return Sentences(
        transformer.folder,
        text.flag("do_lower_case", False),
        modes,
        file.flag("include_prompt", True),
        width,
        tuple(_read_steps(behind, len(modes) * width)),
        truncate,
    )


def _read_modes(file: ConfigFile) -> tuple[Mode, ...]:
    """The modes by their names, or by flags where there is none."""
    mode = file.values.get("pooling_mode")
    names = [mode] if isinstance(mode, str) else mode
    if names is None:
        names = [mode for key, mode in _FLAGS.items() if file.flag(key, False)]
    modes = get_args(Mode)
    if not isinstance(names, list) or not names or any(name not in modes for name in names):
        raise BaseModelError(
            f"{file.path}: pooling is {quoted(names)}; supported are {', '.join(modes)}, one or"
            " several"
        )
    return tuple(names)


def _read_steps(modules: Sequence[ModuleEntry], width: int) -> list[Step]:
    """Args: width: the numbers of the pooled vector."""
    steps: list[Step] = []
    for module in modules:
        has_weights = module.kind in ("Dense", "LayerNorm")
        file = ConfigFile.read(module.folder / "config.json", required=has_weights)
        if module.kind == "Dropout":
            file.require_known(("dropout",))  # of training alone
        elif module.kind == "Normalize":
            file.require_known(("module_input_name", "module_output_name"))
            _require_vector(file)
            steps.append(Normalize())
        elif module.kind == "LayerNorm":
            file.require_known(("dimension",))
            file.size("dimension", width)
            shapes = {"norm.weight": (width,), "norm.bias": (width,)}
            steps.append(LayerNorm(_tensors(module.folder, shapes)))
        else:
            dense = _read_dense(file, width)
            steps.append(dense)
            width = dense.out_features
    return steps


def _read_dense(file: ConfigFile, width: int) -> Dense:
    file.require_known(
        (
            *("in_features", "out_features", "bias", "activation_function", "use_residual"),
            *("module_input_name", "module_output_name"),
        )
    )
    _require_vector(file)
    file.size("in_features", width)
    out = file.size("out_features")
    residual = file.flag("use_residual", False)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (out, width)}
    if file.flag("bias", True):
        shapes["linear.bias"] = (out,)
    if residual and out != width:
        shapes["residual.weight"] = (out, width)
    activation = _read_activation(file, "activation_function", get_args(Activation)) or "Tanh"
    return Dense(out, activation, residual, _tensors(file.path.parent, shapes))


def _require_vector(file: ConfigFile) -> None:
    for key in ("module_input_name", "module_output_name"):
        file.require(key, _VECTOR)


def _read_activation(
    file: ConfigFile, key: str, activations: Sequence[Activation]
) -> Activation | None:
    """The class that a dotted name of torch stands for; None if there is no name."""
    name = file.text(key)
    if name is None:
        return None
    package, _, kind = name.rpartition(".")
    packages = ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear")
    if package not in packages or kind not in activations:
        raise BaseModelError(
            f"{file.path}: {key} is {quoted(name)}, which cannot be built; only"
            f" {', '.join(activations)} of torch.nn can"
        )
    return kind  # type: ignore[return-value]


def _tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """The headers of a module's weights, which have to be exactly these."""
    tensors = read_checkpoint(folder)
    stored = {name: info.shape for name, info in tensors.items()}
    if stored != shapes:
        raise BaseModelError(
            f"{folder}: its weights are {quoted(stored)}; by its config.json they should be"
            f" {dict(shapes)}"
        )
    return tensors


def _read_scores(directory: Path) -> Scores | None:
    """The activation of a CrossEncoder; None for a classifier that is none."""
    config = ConfigFile.read(directory / "config.json")
    model = ConfigFile.read(directory / MODEL_CONFIG)
    folder, lower_case = directory, False
    is_cross_encoder = model.text("model_type") == "CrossEncoder"
    if is_cross_encoder:
        read_model_config(directory)
        modules = read_modules(directory)
        kinds = [module.kind for module in modules]
        if kinds != ["Transformer"]:
            raise BaseModelError(
                f"{directory}: modules.json lists {', '.join(kinds)}; of a CrossEncoder only a"
                " Transformer alone can be built"
            )
        folder = modules[0].folder
        text = read_text_config(folder)
        check_text_config(text, "sequence-classification", "logits", "scores")
        lower_case = text.flag("do_lower_case", False)
        config = ConfigFile.read(folder / "config.json")
    inner = ConfigFile(config.path, config.object("sentence_transformers"))
    inner.require_known(("activation_fn", "version"))
    places = [
        (model, "activation_fn"),
        (inner, "activation_fn"),
        (config, "sbert_ce_default_activation_function"),
    ]
    for file, key in places:
        if activation := _read_activation(file, key, _SCORES):
            return Scores(folder, lower_case, activation)
    if not is_cross_encoder:
        return None
    # What the library takes for one that names none.
    one_label = len(config.object("id2label")) == 1 or config.number("num_labels") == 1
    return Scores(folder, lower_case, "Sigmoid" if one_label else "Identity")


def _no_pooling(directory: Path) -> BaseModelError:
    return BaseModelError(
        f"{directory}: no pooling is declared (modules.json and its config), which task"
        " sentence-embedding needs; use task feature-extraction"
    )
