"""A base's directory: which files of it may be read, and what its config.json may not ask for.

All of it is checked before transformers sees the directory, which may ask, run and follow more.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraexport_runtime.contract.foreign import has_file, read_object
from loraexport_runtime.errors import LoraexportError, quoted, shorten

from ..errors import BaseModelError

CONFIG = "config.json"
_MAX_SAID = 200
"""Letters of what others' code says about a value: it may quote all of it."""
_MAX_COPIED = 2**26
"""Bytes of a file that an artifact gets a copy of: the largest tokenizers that are published have
half of that."""
_REFUSED = {
    "transformers_weights": "it names a file of weights; remove it, and name the file"
    " model.safetensors",
    "fusion_config": "it has transformers exchange modules for others; remove it",
    "quantization_config": "the checkpoint is quantised, and multi-LoRA needs float weights;"
    " dequantise it (model.dequantize(), then save_pretrained), or take the model that it was"
    " made of",
    "compression_config": "the checkpoint is compressed, and multi-LoRA needs float weights; take"
    " the model that it was made of",
}
"""Keys that change which numbers are read, and what to do."""
TOKENIZER_CLASS = "AutoTokenizer"
"""The key of auto_map that says nothing of the model; hf.tokenizer looks at it."""
_SAME_OWNER = "microsoft"
_SAME_CLASSES = {
    "phi3": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
}
"""model_type -> classes of a base's own that transformers has too, by their publisher's word.

phi3: the model cards of microsoft/Phi-3-mini-4k-instruct, Phi-3.5-mini-instruct and
Phi-4-mini-instruct say that transformers has them since 4.41.2, 4.43.0 and 4.49.0.
"""


def read_values(directory: Path) -> dict[str, Any]:
    """The values of config.json, of a directory that holds a model and nothing of another kind.

    Raises:
        BaseModelError: a file is no file, or a value asks for code, or for other weights.
    """
    require_plain_files(directory)
    file = directory / CONFIG
    values = read_object(file, BaseModelError, "give a Hugging Face model's directory")
    if has_file(directory / "adapter_config.json"):
        raise BaseModelError(
            f"{directory}: adapter_config.json lies beside config.json, so transformers would load"
            " that adapter too; give the base's own directory, and name the adapter in adapters"
        )
    _refuse(values, file)
    for value in values.values():  # of the parts of a model, each with a config of its own
        if isinstance(value, Mapping):
            _refuse(value, file)
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise BaseModelError(
            f"{file}: architectures: expected a list of texts, got {quoted(architectures)}; correct"
            " it, or download the base again"
        )
    return values


def require_plain_files(directory: Path) -> None:
    """Raise BaseModelError if a FIFO, a device or a socket is among a directory's files."""
    try:
        names = sorted(os.listdir(directory))
    except (OSError, ValueError) as cause:
        raise BaseModelError(f"{directory}: cannot be listed: {cause}") from cause
    for name in names:
        try:
            mode = (directory / name).stat().st_mode
        except OSError:
            continue  # a link to nothing; who needs the file says that it is not there
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise BaseModelError(
                f"{directory / name}: not a regular file; copy or download it again"
            )


def require_copyable(file: Path) -> None:
    """Hold a file that an artifact gets a copy of to the base's own real folder, and to 64 MiB.

    Raises:
        BaseModelError: it is larger, or lies outside.
    """
    try:
        real = file.resolve(strict=True)
        size = real.stat().st_size
    except (OSError, RuntimeError) as cause:
        raise BaseModelError(f"{file}: a link to nothing; copy the file itself here") from cause
    if not is_within(real, file.parent):
        raise BaseModelError(
            f"{file}: a link out of the base's folder, and an artifact gets a copy of it; put the"
            " file itself here"
        )
    if size > _MAX_COPIED:
        raise BaseModelError(
            f"{file}: {size} bytes, and an artifact gets a copy of it; no tokenizer has more than"
            f" {_MAX_COPIED >> 20} MiB: copy or download it again"
        )


def is_within(real: Path, directory: Path) -> bool:
    """Whether a file, its links followed, is one of a directory's own.

    A snapshot in the hub's cache is links into the `blobs` beside it.
    """
    directory = directory.resolve()
    roots, repository = [directory], directory.parent.parent
    if directory.parent.name == "snapshots":
        blobs = (repository / "blobs").resolve()
        roots += [blobs] if blobs == repository / "blobs" else []
    return any(real.is_relative_to(root) for root in roots)


def foreign_classes(values: Mapping[str, Any], known: Mapping[str, str]) -> str | None:
    """What auto_map names beside a tokenizer and what is known to be transformers' own.

    A name may have the repository of its file before it: `owner/name--module.Class`.
    """
    auto_map = values.get("auto_map")
    if not auto_map:
        return None
    if not isinstance(auto_map, dict):
        return str(auto_map)
    names = []
    for key, value in auto_map.items():
        repository, _, name = str(value).rpartition("--")
        is_known = known.get(key) == name and repository.partition("/")[0] in ("", _SAME_OWNER)
        if not is_known and key != TOKENIZER_CLASS:
            names.append(str(value))
    return ", ".join(names) or None


def _refuse(values: Mapping[str, Any], file: Path) -> None:
    model_type = values.get("model_type")
    known = _SAME_CLASSES.get(model_type, {}) if isinstance(model_type, str) else {}
    names = foreign_classes(values, known)
    if names:
        raise BaseModelError(
            f"{file}: auto_map names code of the base's own ({quoted(names)}), which is never run,"
            " and transformers' own class may compute something else. Is it known to compute the"
            " same, remove auto_map from config.json"
        )
    for key, why in _REFUSED.items():
        if values.get(key):
            raise BaseModelError(f"{file}: {key}: {why}")


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """What transformers raises, on whatever values a file has, as a BaseModelError: `what: why`."""
    try:
        yield
    except LoraexportError:
        raise
    except Exception as error:  # a class of its own for every kind of value that does not fit
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise BaseModelError(
            f"{what}: {type(error).__name__}: {shorten(said, _MAX_SAID)}; correct {CONFIG}, or"
            " download the base again"
        ) from error
