"""manifest.json: the one definition of what an artifact holds. Written by the exporter, read here.

Everything is a frozen dataclass; `Manifest.read` is strict: a missing or unknown key, a wrong type
or a path that leaves the artifact is an ArtifactError.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError
from . import format4
from .files import MANIFEST_FILE, FileEntry, difference, require_pinned, resolve
from .json_values import dump, parse
from .kinds import Kind, Packed, packed_of
from .seal import is_sealed

FORMAT_VERSION = 5
BIAS_ROWS = 8
"""Rows that the bias of an augmented layer takes in its stacks: itself, and zeros for alignment."""

Strategy = Literal["segmented", "masked", "augmented", "chunked"]
DType = Literal["float32", "float16", "bfloat16"]
ParityStatus = Literal["passed", "deferred", "failed"]


@dataclass(frozen=True)
class Slice:
    """One output part of a layer: columns [offset, offset + width) of y, with its own A and B."""

    name: str
    site: str
    offset: int
    width: int


@dataclass(frozen=True)
class Stack:
    """One overridable initializer that holds a factor or parameter of every slot.

    Slot s, from 1 on, owns the `rows_per_slot` rows from `row_offset + (s - 1) * rows_per_slot`
    on. The rows ahead of `row_offset` are the base's: where base and expand are one product
    (augmented) W^T, and where that takes the bias along BIAS_ROWS for it, which are zeros in
    lora_A; its own value where a role replaces a parameter of the base. A layer may have several
    stacks of role lora_B, side by side.
    """

    name: str
    role: Literal["lora_A", "lora_B", "output_scale", "bias", "weight"]
    shape: tuple[int, int]
    rows_per_slot: int
    row_offset: int
    column_offset: int
    """The first of the layer's columns that this stack holds; 0 unless another is to its left."""
    slot_rows: tuple[int, ...] | None = None
    """The rows of each slot where slots stay as built, in place of `rows_per_slot` for all."""

    @property
    def columns(self) -> slice:
        return slice(self.column_offset, self.column_offset + self.shape[1])

    def rows(self, slot: int) -> slice:
        if self.slot_rows is not None:
            start = self.row_offset + sum(self.slot_rows[: slot - 1])
            return slice(start, start + self.slot_rows[slot - 1])
        start = self.row_offset + (slot - 1) * self.rows_per_slot
        return slice(start, start + self.rows_per_slot)


@dataclass(frozen=True)
class Layer:
    """x [num_tokens, in_features] (or ids [num_tokens]) -> y [num_tokens, out_features].

    A graph of its own for kind layers, else a site of the one graph.
    For an embedding `in_features` is the vocabulary's size.
    """

    name: str
    kind: Literal["linear", "embedding"]
    in_features: int
    out_features: int
    slices: tuple[Slice, ...]
    max_rank: int
    strategy: Strategy
    stacks: tuple[Stack, ...]
    base_rows: str | None
    """Safetensors file with the base's rows of those stacks that have any, by stack."""
    in_base: bool
    """False: a head that the base lacks, so every row needs an adapter that brings it."""
    labels: bool
    """Its outputs are labels, of which an adapter's own head may have fewer."""
    onnx: str | None
    """Path of the ONNX graph inside the artifact; None if the spec asks for none."""
    torchscript: str | None

    @property
    def input_name(self) -> str:
        return "ids" if self.kind == "embedding" else "x"

    def stack(self, role: str) -> Stack | None:
        """The stack of a role, where the layer has one."""
        return next((stack for stack in self.stacks if stack.role == role), None)

    def files(self) -> list[str]:
        """The paths of this layer's files inside the artifact."""
        return [path for path in (self.onnx, self.torchscript, self.base_rows) if path]


@dataclass(frozen=True)
class AdapterSite:
    rank: int
    scaling: float
    """As PEFT computes it, times the spec's `scale`."""


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that the artifact carries in `path`; `slot` None: it does not start loaded."""

    name: str
    path: str
    digest: str
    scale: float
    slot: int | None
    sites: dict[str, AdapterSite]
    heads: tuple[str, ...]
    """The sites whose weight and bias it replaces (modules_to_save)."""


@dataclass(frozen=True)
class BaseEntry:
    source: str
    """The base as the spec names it: a path, a hub id, a package, or a seed."""
    digest: str
    weights: dict[str, str]
    """sha256 of each site's base weight, by site."""


@dataclass(frozen=True)
class ParitySummary:
    status: ParityStatus
    """`deferred`: the ONNX graphs have not been run yet; `loraexport verify` settles it."""
    checked: tuple[str, ...]
    """What was compared with the float64 oracle: eager, torchscript, onnx-cpu, onnx-cuda."""
    max_error: float | None
    """Largest relative error over all of them; None if one is no number, or nothing was run."""
    tolerance: float


@dataclass(frozen=True)
class Manifest:
    """What an artifact's manifest.json says."""

    format_version: int
    """As it was written: a manifest of format 4 is read into the values of format 5."""
    name: str
    kind: Kind
    created: str
    dtype: DType
    spec_digest: str
    num_slots: int
    layers: tuple[Layer, ...]
    """The graphs of `layers`, or the sites in the one graph of the other kinds."""
    adapters: tuple[AdapterEntry, ...]
    base: BaseEntry
    parity: ParitySummary
    tools: dict[str, str]
    files: dict[str, FileEntry]

    @property
    def needs_cuda(self) -> str | None:
        """Why onnxruntime's CPU provider cannot run the ONNX graphs; None if it can."""
        return cuda_reason(self.dtype, packed_of(self.kind))

    def to_json(self) -> str:
        return json.dumps(dump(Manifest, self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path, digest: str | None = None) -> "Manifest":
        """Read and check manifest.json; does not look at the other files (see `check_files`).

        Args:
            digest: the sha256 that its bytes must have; default: any.

        Raises:
            ArtifactError: there is none, it is damaged, of another format or digest, or makes no
                sense.
        """
        file = folder / MANIFEST_FILE
        data = _read_json(folder, digest)
        try:
            if data["format_version"] == format4.FORMAT:
                data = format4.upgrade(data)
            manifest: Manifest = parse(cls, data, "manifest")
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{file}: {error}; build the artifact again") from error
        for path in manifest.paths():
            resolve(folder, path)
        try:
            manifest.check_sense()
        except ValueError as error:
            raise ArtifactError(f"{file}: {error}; build the artifact again") from error
        return manifest

    def paths(self) -> list[str]:
        """Every path that the manifest names."""
        return [*self.files, *self._graphs(), *(adapter.path for adapter in self.adapters)]

    def _graphs(self) -> list[str]:
        return [path for layer in self.layers for path in layer.files()] + self.kind.files()

    def check_sense(self) -> None:
        """Raise ValueError where parts contradict each other."""
        unlisted = [path for path in self._graphs() if path not in self.files]
        if unlisted:
            raise ValueError(
                f"manifest.files: {unlisted[0]!r} is missing, so nothing vouches for it"
            )
        for what, names in (("layers", self.layers), ("adapters", self.adapters)):
            if len({name.name for name in names}) < len(names):
                raise ValueError(f"manifest.{what}: two of them have one name")
        taken = [entry.slot for entry in self.adapters if entry.slot is not None]
        if len(set(taken)) < len(taken) or not set(taken) <= set(range(1, self.num_slots + 1)):
            raise ValueError(
                f"manifest.adapters: slots {taken} are not distinct slots of 1 to {self.num_slots}"
            )
        for layer in self.layers:
            for stack in layer.stacks:
                sizes = (stack.row_offset, *(stack.slot_rows or [0] * self.num_slots))
                is_odd = min(sizes) < 0 or len(sizes) != 1 + self.num_slots
                if is_odd or stack.rows(self.num_slots).stop != stack.shape[0]:
                    raise ValueError(
                        f"manifest.layers: stack {stack.name!r} has {stack.shape[0]} rows, which"
                        f" {self.num_slots} slots do not fill"
                    )
                has_own = layer.base_rows is not None and stack.row_offset == stack.rows_per_slot
                if stack.role not in ("lora_A", "lora_B") and not has_own:
                    raise ValueError(
                        f"manifest.layers: stack {stack.name!r} replaces the base's {stack.role},"
                        " which it does not have"
                    )

    def check_files(self, folder: Path) -> None:
        """Compare size and sha256 of every listed file. Raises ArtifactError if one differs."""
        for path, entry in self.files.items():
            file = resolve(folder, path)
            try:
                problem = difference(file, entry)
            except OSError as error:
                raise ArtifactError(f"{folder}: a listed file cannot be read: {error}") from error
            if problem:
                raise ArtifactError(f"{file}: {problem}; copy the artifact again")


def _read_json(folder: Path, digest: str | None) -> dict[str, Any]:
    """manifest.json of a format that is known; from format 5 on as its digest says."""
    file = folder / MANIFEST_FILE
    while True:
        try:
            content = file.read_bytes()
            require_pinned(file, content, digest)
            data = json.loads(content.decode())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ArtifactError(
                f"{folder}: no {MANIFEST_FILE} here; an artifact is a folder that"
                " 'loraexport build' has published"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{file}: not readable as JSON ({error}); copy the artifact again, or build it"
                " again"
            ) from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if type(version) is not int or version not in (format4.FORMAT, FORMAT_VERSION):
            raise ArtifactError(
                f"{file}: format_version is {version!r}, this runtime reads {format4.FORMAT} and"
                f" {FORMAT_VERSION}; build the artifact again, or install the runtime that matches"
                " it"
            )
        if version == format4.FORMAT or is_sealed(folder, content):
            return data


def cuda_reason(dtype: DType, packed: Packed | None) -> str | None:
    """What onnxruntime's CPU provider lacks for graphs of this kind, in words; None: nothing."""
    if dtype == "bfloat16":
        return "onnxruntime's CPU provider has no bfloat16 MatMul"
    if packed == "cuda":
        return "onnxruntime's CPU provider has no PackedMultiHeadAttention"
    return None
