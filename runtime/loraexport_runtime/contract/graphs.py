"""A manifest held to the graphs that it names, before memory is taken or anything is opened.

onnxruntime takes a value for an initializer that a graph lacks in silence, and reads what a graph
says of other files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ArtifactError
from .files import resolve
from .genai_config import GENAI_CONFIG, check_cache, read_genai_config
from .kinds import (
    ADAPTER_WEIGHTS,
    GOES_ON,
    LENGTHS,
    PLACES,
    ROWS,
    Decoder,
    Graph,
    Layers,
    Model,
    TensorEntry,
)
from .listed import ListedFiles
from .manifest import FUNCTION_DOMAIN, Layer, Manifest
from .onnx_file import TENSOR_TYPES, OnnxFile, TensorType, read_onnx

_TOLD = TensorEntry(ROWS, "int64", ("rows", "told"))
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Hold stacks, inputs, outputs and files to what is in the graphs.

    Raises:
        ArtifactError: a graph is damaged, takes or gives something else, lacks a stack, or reads a
            file that is not listed.
    """
    files = ListedFiles(folder, manifest.files)
    _check_sizes(folder, manifest)
    match manifest.kind:
        case Layers():
            for layer in manifest.layers:
                if layer.onnx is not None:
                    graph = _read(files, layer.onnx)
                    _Checked(folder / layer.onnx, graph).check_layer(layer, manifest.dtype)
        case (Model() as model) | Graph(model):
            if model.onnx is not None:
                checked = _Checked(folder / model.onnx, _read(files, model.onnx))
                # A graph that existed may have initializers of its own that can be overridden.
                is_ours = isinstance(manifest.kind, Model)
                checked.check_stacks(manifest.layers, manifest.dtype, exact=is_ours)
                checked.check_model(model)
        case Decoder() as decoder:
            opened = _read(files, decoder.onnx)
            checked = _Checked(folder / decoder.onnx, opened)
            checked.check_stacks(manifest.layers, manifest.dtype)
            checked.check_inputs(_control(decoder))
            if decoder.steps is not None:
                step = _Checked(folder / decoder.steps.step, _read(files, decoder.steps.step))
                step.check_stacks(manifest.layers, manifest.dtype)
                step.check_step(decoder)
                for path in (decoder.steps.top_tokens, decoder.steps.row_logits):
                    _Checked(folder / path, _read(files, path)).check_inputs(("logits", "rows"))
            config = _check_folder(files, decoder)
            check_cache(config, opened, resolve(folder, decoder.folder), ArtifactError)


class _Checked:
    """A graph that is there, and what a manifest says of it."""

    def __init__(self, file: Path, graph: OnnxFile) -> None:
        self._file = file
        self._graph = graph

    def check_layer(self, layer: Layer, dtype: str) -> None:
        """Its stacks, its one input, and y."""
        self.check_stacks([layer], dtype, exact=True)
        ids = layer.kind == "embedding"
        x = TensorEntry(layer.input_name, "int64" if ids else dtype, ("batch",))  # type: ignore[arg-type]
        if not ids:
            x = TensorEntry(x.name, x.dtype, ("batch", str(layer.in_features)))
        y = TensorEntry("y", x.dtype if not ids else dtype, ("batch", str(layer.out_features)))  # type: ignore[arg-type]
        self.check_inputs((x.name, "seg_indptr", "seg_slots"))
        self._check_values("input", [x], self._graph.inputs)
        self._check_values("output", [y], self._graph.outputs)

    def check_model(self, model: Model) -> None:
        """Its inputs and outputs."""
        self.check_inputs((*_control(model), *(entry.name for entry in model.inputs)), whole=True)
        if not model.inputs or not model.outputs:
            raise self._refuse("it takes or gives nothing")
        self._check_values("input", model.inputs, self._graph.inputs)
        self._check_values("output", model.outputs, self._graph.outputs)

    def check_step(self, decoder: Decoder) -> None:
        """Its inputs beside the decoder's."""
        self.check_inputs((*_control(decoder), ROWS, LENGTHS, GOES_ON, PLACES))
        self._check_values("input", [_TOLD], self._graph.inputs)  # earlier builds had [rows]

    def check_stacks(self, layers: Sequence[Layer], dtype: str, exact: bool = False) -> None:
        """Every stack is an initializer of this shape and dtype that may be overridden, and every
        function is there.

        Args:
            exact: and every such initializer is a stack: loads would leave another as it is.
        """
        known = {ADAPTER_WEIGHTS, *(stack.name for layer in layers for stack in layer.stacks)}
        more = self._graph.inputs.keys() & self._graph.initializers.keys() - known
        if exact and more:
            raise self._refuse(f"its initializer {min(more)!r} can be overridden, and is no stack")
        for layer in layers:
            function = FUNCTION_DOMAIN, layer.function
            if layer.function and function not in self._graph.functions:
                raise self._refuse(f"it has no function {layer.function!r}")
        for stack in (stack for layer in layers for stack in layer.stacks):
            kind = self._graph.initializers.get(stack.name)
            if kind is None or stack.name not in self._graph.inputs:
                raise self._refuse(f"it has no initializer {stack.name!r} that can be overridden")
            values = stack.dtype(dtype)
            if kind != TensorType(TENSOR_TYPES[values], stack.shape):
                raise self._refuse(
                    f"its initializer {stack.name!r} is no {values} of {list(stack.shape)}"
                )

    def check_inputs(self, names: Iterable[str], whole: bool = False) -> None:
        """It takes these inputs; `whole`: and no others have to be fed."""
        fed = set(self._graph.inputs) - set(self._graph.initializers)
        missing = sorted(set(names) - set(self._graph.inputs))
        more = sorted(fed - set(names)) if whole else []
        if missing or more:
            has = "no input" if missing else "another input"
            raise self._refuse(f"it has {has} {(missing or more)[0]!r}")

    def _check_values(
        self, what: str, entries: Iterable[TensorEntry], values: Mapping[str, TensorType]
    ) -> None:
        for entry in entries:
            value = values.get(entry.name)
            if value is None or value.dtype != TENSOR_TYPES[entry.dtype]:
                raise self._refuse(f"it has no {what} {entry.name!r} of {entry.dtype}")
            sizes = [int(size) if size.isdecimal() else None for size in entry.shape]
            if value.shape is None:
                continue
            fits = len(sizes) == len(value.shape) and all(
                None in (size, there) or size == there
                for size, there in zip(sizes, value.shape, strict=False)
            )
            if not fits:
                raise self._refuse(f"its {what} {entry.name!r} is not {list(entry.shape)}")

    def _refuse(self, problem: str) -> ArtifactError:
        return ArtifactError(
            f"{self._file}: {problem}, which the manifest says, so they are not of one artifact;"
            " build it again"
        )


def _control(kind: Model | Decoder) -> tuple[str, ...]:
    """The inputs that say what each row uses."""
    return ("adapter_ids", *([ADAPTER_WEIGHTS] if kind.blend else []))


def _read(files: ListedFiles, path: str) -> OnnxFile:
    """A listed graph. Raises ArtifactError: it reads a file that is not listed."""
    file = resolve(files.folder, path)
    graph = read_onnx(file, ArtifactError)
    for location in sorted(graph.locations):
        place = PurePosixPath(path).parent / location
        if str(place) not in files or "\0" in location:
            raise ArtifactError(
                f"{file}: it keeps weights in {location!r}, which the manifest does not list, so"
                " nothing vouches for it and nothing is opened; build the artifact again"
            )
    return graph


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    """The graphs hold a first value of every stack, so that the files bound what is allocated."""
    asked = sum(
        math.prod(stack.shape) * _BYTES[stack.dtype(manifest.dtype)]
        for layer in manifest.layers
        for stack in layer.stacks
    )
    size = sum(entry.size for entry in manifest.files.values())
    if asked > size:
        raise ArtifactError(
            f"{folder}: the manifest asks for stacks of {asked:,} bytes,"
            f" and all files together have {size:,}; build the artifact again"
        )


def _check_folder(files: ListedFiles, decoder: Decoder) -> dict[str, Any]:
    """onnxruntime-genai reads the folder by itself: every file in it has to be listed.

    Returns:
        What its config says of the model.
    """
    folder = resolve(files.folder, decoder.folder)
    listed = files.below(decoder.folder)
    for file in sorted(folder.iterdir()):
        path = f"{decoder.folder}/{file.name}"
        if path not in listed and not (file.is_dir() and not file.is_symlink()):
            raise ArtifactError(
                f"{file}: the manifest does not list it, and onnxruntime-genai could read it;"
                " remove it, or copy the artifact again"
            )
    model: dict[str, Any] = read_genai_config(folder)["model"]
    values = {
        "context_length": decoder.max_length,
        "vocab_size": decoder.vocab_size,
    }
    same = all(value in (None, model.get(key)) for key, value in values.items())
    if not same or f"{decoder.folder}/{model['decoder']['filename']}" != decoder.onnx:
        raise ArtifactError(
            f"{folder / GENAI_CONFIG}: its graph or sizes are not those of the manifest;"
            " build the artifact again"
        )
    return model
