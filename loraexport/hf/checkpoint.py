"""A Hugging Face directory -> name, shape and file of every tensor, from headers alone."""

from pathlib import Path

from loraexport_runtime.adapters.tensor_files import FLOAT_DTYPES, TensorInfo, read_header
from loraexport_runtime.contract.foreign import has_file, read_object, value_of
from loraexport_runtime.errors import quoted

from ..errors import BaseModelError

_SINGLE = "model.safetensors"
_SUFFIX = ".safetensors"
_INDEX = "model.safetensors.index.json"


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of model.safetensors, of the shards an index lists, or of the only file there.

    Raises:
        BaseModelError: there is no safetensors file, or the index does not fit its shards.
        WeightsError: a file's header is damaged.
    """
    if has_file(folder / _INDEX):
        return _read_shards(folder)
    if has_file(folder / _SINGLE):
        return read_header(folder / _SINGLE)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise BaseModelError(
            f"{folder}: {len(files)} safetensors files but no {_INDEX} that says which tensor is"
            " where; save the model with save_pretrained"
        )
    pickled = sorted(folder.glob("*.bin"))
    if pickled:
        read_header(pickled[0])  # says why pickled weights are refused
    raise BaseModelError(
        f"{folder}: no safetensors file here; expected {_SINGLE} or {_INDEX}, as save_pretrained"
        " writes them"
    )


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / _INDEX
    weight_map = value_of(
        read_object(index, BaseModelError), "weight_map", dict, index, BaseModelError
    )
    for file in weight_map.values():
        if not isinstance(file, str) or "\0" in file:
            raise BaseModelError(
                f"{index}: weight_map: expected names of files, got {quoted(file)}; save the model"
                " again"
            )
    shard_of: dict[str, str] = dict(weight_map)
    if not shard_of:
        raise BaseModelError(f"{index}: weight_map is empty; save the model again")
    headers = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or shard == "..":
            raise BaseModelError(
                f"{index}: shard {shard!r} is not a file of this folder; a shard lies beside its"
                " index and is named without a path"
            )
        if shard and not shard.endswith(_SUFFIX):
            raise BaseModelError(
                f"{index}: shard {quoted(shard)} is no {_SUFFIX} file; others are unpickled on load"
                " and can run code, so only safetensors are read: save the model again"
            )
        if not shard or not has_file(folder / shard):
            raise BaseModelError(
                f"{index}: shard {shard} is not there; the download is not complete, fetch it again"
            )
        headers[shard] = read_header(folder / shard)
    missing = [name for name, shard in shard_of.items() if name not in headers[shard]]
    if missing:
        raise BaseModelError(
            f"{index}: says that {missing[0]!r} is in {shard_of[missing[0]]}, but it is not there;"
            " index and shards are of different versions"
        )
    return {name: headers[shard][name] for name, shard in shard_of.items()}


def stored_dtype(folder: Path) -> str:
    """The dtype of all tensors of floats, `F16` or `BF16`; else `F32`, which holds either."""
    kinds = {info.dtype for info in read_checkpoint(folder).values() if info.dtype in FLOAT_DTYPES}
    return kinds.pop() if kinds in ({"F16"}, {"BF16"}) else "F32"


def read_float_weights(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of the files that transformers loads. Buffers may be integers.

    Raises:
        BaseModelError, WeightsError: see `read_checkpoint`; or a weight is of a quantised type,
            which transformers would take as it is.
    """
    single = folder / _SINGLE
    # It takes the single file where both are there.
    infos = read_header(single) if has_file(single) else read_checkpoint(folder)
    for name, info in infos.items():
        if name.endswith("weight") and info.dtype not in FLOAT_DTYPES:
            raise BaseModelError(
                f"{info.path}: {quoted(name)} is {info.dtype}: the checkpoint is quantised, and"
                f" only float weights ({', '.join(FLOAT_DTYPES)}) are read; dequantise it first, or"
                " take the model that it was made of"
            )
    return infos
