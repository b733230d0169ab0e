"""genai_config.json, by which onnxruntime-genai knows a decoder's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, LoraexportError, quoted
from .foreign import read_object, value_of
from .onnx_file import OnnxFile, TensorType

GENAI_CONFIG = "genai_config.json"
_SIZES = (
    "vocab_size",
    "context_length",
    "decoder.head_size",
    "decoder.num_attention_heads",
    "decoder.num_key_value_heads",
    "decoder.num_hidden_layers",
)
_NAMES = tuple(
    f"decoder.{key}"
    for part in ("key", "value")
    for key in (f"inputs.past_{part}_names", f"outputs.present_{part}_names")
)
_KEYS: dict[str, frozenset[str]] = {
    "": frozenset({"model", "search"}),
    "model": frozenset(
        {"type", "decoder", "context_length", "vocab_size", "decoder_start_token_id"}
        | {f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "bot", "eot", "bor", "eor")}
    ),
    "model.decoder": frozenset(
        {"filename", "inputs", "outputs", "session_options", "sliding_window", "head_size"}
        | {"hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"}
    ),
    "model.decoder.session_options": frozenset(
        {"log_id", "log_severity_level", "log_verbosity_level", "provider_options"}
        | {"intra_op_num_threads", "inter_op_num_threads", "graph_optimization_level"}
        | {"enable_cpu_mem_arena", "enable_mem_pattern", "ep.cuda.fpa_intb_gemm"}
        | {"optimization.disable_specified_optimizers"}
        | {"session.use_device_allocator_for_initializers"}
    ),
    "model.decoder.sliding_window": frozenset(
        {"window_size", "pad_value", "alignment", "slide_key_value_cache", "slide_inputs"}
        | {"layers", "cache_slack"}
    ),
    "search": frozenset(
        {"do_sample", "temperature", "top_k", "top_p", "random_seed", "num_beams", "max_length"}
        | {"min_length", "early_stopping", "length_penalty", "repetition_penalty"}
        | {"diversity_penalty", "no_repeat_ngram_size", "num_return_sequences"}
        | {"past_present_share_buffer"}
    ),
}
"""What onnxruntime-genai's model builder writes of a decoder, and what says how fast it runs."""
_PROVIDERS = {
    "cuda": frozenset({"enable_cuda_graph", "enable_skip_layer_norm_strict_mode"}),
    "dml": frozenset({"enable_graph_capture"}),
    "webgpu": frozenset({"enableGraphCapture", "validationMode"}),
    "NvTensorRtRtx": frozenset({"enable_cuda_graph"}),
}
"""The builder's too: options of others name libraries to load."""

_OTHER = "the two are not of one folder: make both again, by onnxruntime-genai's model builder"
_REMOVE = "remove it, or let onnxruntime-genai's model builder make this folder again"
_LISTS = ("model.eos_token_id", "model.decoder.sliding_window.layers")
_NAMES_OF = ("model.decoder.inputs", "model.decoder.outputs")


def read_genai_config(folder: Path, error: type[LoraexportError] = ArtifactError) -> dict[str, Any]:
    """The whole config, `model` and how it is searched, with all that this project reads of it.

    Raises:
        error: the file is missing or damaged, a value is missing or of another type, or a key is
            there that is not known to be harmless: some make onnxruntime-genai run native code.
    """
    file = folder / GENAI_CONFIG
    config = read_object(file, error)
    value_of(config, "search", dict, file, error)
    model = value_of(config, "model", dict, file, error)
    for key in _SIZES:
        if value_of(model, key, int, file, error) < 1:
            raise error(f"{file}: model.{key}: expected a positive integer; download it again")
    filename = value_of(model, "decoder.filename", str, file, error)
    if not filename or filename in (".", "..") or set(filename) & set("/\\\0"):
        raise error(
            f"{file}: model.decoder.filename: expected the name of a file in this folder, got"
            f" {filename!r}; name the graph that lies here"
        )
    for key in _NAMES:
        if "%d" not in value_of(model, key, str, file, error):
            raise error(f"{file}: model.{key}: expected a name with %d; download it again")
    for key in ("inputs", "outputs"):
        for name in value_of(model, f"decoder.{key}", dict, file, error):
            value_of(model["decoder"][key], name, str, file, error)
    if "session_options" in model["decoder"]:
        value_of(model, "decoder.session_options", dict, file, error)
    ends = model.get("eos_token_id")
    if not (_are_tokens(ends) if isinstance(ends, list) else _are_tokens([ends])):
        raise error(f"{file}: model.eos_token_id: expected one token or several, got {ends!r}")
    for key in ("bos_token_id", "pad_token_id"):
        if model.get(key) is not None:
            value_of(model, key, int, file, error)
    _check_keys(config, file, error)
    return config


def check_cache(
    model: Mapping[str, Any], graph: OnnxFile, folder: Path, error: type[LoraexportError]
) -> None:
    """Hold what a config says of the cache to the graph: names, layers, heads and their size.

    Args:
        model: of the config.
        graph: the file that it names.

    Raises:
        error: they differ, and onnxruntime would fail in the middle of a batch.
    """
    decoder = model["decoder"]
    count = decoder["num_hidden_layers"]
    sizes = (decoder["num_key_value_heads"], decoder["head_size"])
    for values, names in ((graph.inputs, decoder["inputs"]), (graph.outputs, decoder["outputs"])):
        for pattern in (name for name in names.values() if "%d" in name):
            shapes = _shapes_of(pattern, values)
            if len(shapes) != count or max(shapes) >= count:
                raise error(
                    f"{folder / GENAI_CONFIG}: model.decoder.num_hidden_layers is {count}, and the"
                    f" graph has {len(shapes)} of {quoted(pattern)}; {_OTHER}"
                )
            for shape in shapes.values():
                if shape is not None and not _fits(shape, sizes):
                    raise error(
                        f"{folder / GENAI_CONFIG}: model.decoder: num_key_value_heads and head_size"
                        f" are {sizes[0]} and {sizes[1]}, and {quoted(pattern)} of the graph is"
                        f" {list(shape)}; {_OTHER}"
                    )


def _shapes_of(
    pattern: str, values: Mapping[str, TensorType]
) -> dict[int, tuple[int | None, ...] | None]:
    """The shape of each value that a pattern with %d names, by its number."""
    before, _, after = pattern.partition("%d")
    numbers = {name: name.removeprefix(before).removesuffix(after) for name in values}
    return {
        int(number): values[name].shape
        for name, number in numbers.items()
        if number.isdecimal() and name == f"{before}{number}{after}"
    }


def _fits(shape: tuple[int | None, ...], sizes: tuple[int, int]) -> bool:
    """Whether a cache of [rows, heads, length, size] may have these heads and this size."""
    if len(shape) != 4:
        return False
    return all(there in (None, size) for there, size in zip(shape[1::2], sizes, strict=True))


def end_tokens(model: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text; `model`: of the config, which gives one or a list."""
    ends = model["eos_token_id"]
    return list(ends) if isinstance(ends, list) else [ends]


def _are_tokens(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


def _check_keys(config: Mapping[str, Any], file: Path, error: type[LoraexportError]) -> None:
    """Raise `error` for a key that is not in the table, or a value that could hold more of them."""
    for path, allowed in _KEYS.items():
        part = _part(config, path)
        if not isinstance(part, Mapping):
            continue  # absent, or its type is told of elsewhere
        where = f"{path}." if path else ""
        _require_known(part, allowed, where, file, error)
        for key, value in part.items():
            inner = f"{where}{key}"
            if inner not in _KEYS and not _is_plain(value, inner):
                raise error(f"{file}: {inner}: expected a plain value; {_REMOVE}")
    providers = _part(config, "model.decoder.session_options.provider_options")
    for entry in providers if isinstance(providers, list) else ():
        for name, options in entry.items() if isinstance(entry, Mapping) else [(str(entry), None)]:
            where = f"model.decoder.session_options.provider_options: {name}"
            if name not in _PROVIDERS or not isinstance(options, Mapping):
                raise error(f"{file}: {where} is no provider that is known here; {_REMOVE}")
            _require_known(options, _PROVIDERS[name], f"{where}.", file, error)


def _part(config: Any, path: str) -> Any:
    """What lies at a dotted path, or None."""
    for key in filter(None, path.split(".")):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _require_known(
    part: Mapping[str, Any],
    allowed: frozenset[str],
    where: str,
    file: Path,
    error: type[LoraexportError],
) -> None:
    unknown = sorted(set(part) - allowed)
    if unknown:
        raise error(
            f"{file}: unknown key '{where}{unknown[0]}': such a key can make onnxruntime-genai load"
            f" a library or other files, or change what it computes; {_REMOVE}"
        )


def _is_plain(value: Any, path: str) -> bool:
    """Whether it is a text, a number or a truth, or a list or an object where that is expected."""
    if path in _NAMES_OF or path == "model.decoder.session_options.provider_options":
        return True
    if isinstance(value, list):
        return path in _LISTS
    return not isinstance(value, Mapping)
