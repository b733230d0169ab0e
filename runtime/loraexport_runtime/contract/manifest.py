"""manifest.json: the one definition of what an artifact holds. Written by the exporter, read here.

Everything is a frozen dataclass; `Manifest.read` is strict: a missing or unknown key, a wrong type
or a path that leaves the artifact is an ArtifactError.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError, quoted
from . import format4
from .files import MANIFEST_FILE, FileEntry, difference, require_pinned, resolve
from .foreign import read_bounded, reason
from .json_values import OPTIONAL, dump, parse, strict_json
from .kinds import Decoder, Graph, Kind, Model, Packed, TensorEntry, is_dimension, packed_of
from .naming import Naming
from .seal import MAX_MANIFEST, is_sealed

FORMAT_VERSION = 5
BIAS_ROWS = 8
"""Rows that the bias of an augmented layer takes in its stacks: itself, and zeros for alignment."""
PARAMETERS = ("output_scale", "bias", "weight")
"""Roles of stacks that replace a parameter of the base, whose own value is ahead of the slots."""
MAX_SLOTS = 2**16
"""What a session keeps of each slot is small, but not nothing; far above what memory holds."""
MAX_SIZE = 2**31 - 1
"""Of a dimension: far above any vocabulary."""

Strategy = Literal["segmented", "masked", "augmented", "chunked"]
Function = Literal["LoraAdd", "LoraAdd2", "LoraAdd3", "LoraLinear", "LoraLinear2", "LoraLinear3"]
"""For which a library of the host may have kernels."""
FUNCTION_DOMAIN = "loraexport"
"""Of these functions, and of the one that routes for them."""
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
    stacks of role lora_B, side by side. Of role rank is one whose rows are numbers: how many of its
    slot's rows in lora_A and lora_B are in use, from the first on.
    """

    name: str
    role: Literal["lora_A", "lora_B", "rank", "output_scale", "bias", "weight"]
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

    def dtype(self, dtype: str) -> str:
        """Of its values, in an artifact of this dtype."""
        return "int64" if self.role == "rank" else dtype

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
    """Safetensors file with the base's rows of those stacks that have any, by stack; None where
    none has, and of a decoder, whose graph has them."""
    in_base: bool
    """False: a head that the base lacks, so every row needs an adapter that brings it."""
    labels: bool
    """Its outputs are labels, of which an adapter's own head may have fewer."""
    onnx: str | None
    """Path of the ONNX graph inside the artifact; None if the spec asks for none."""
    torchscript: str | None
    function: Function | None = field(default=None, metadata=OPTIONAL)
    """The ONNX function of domain `loraexport` that the graph calls for its LoRA; None: it has
    stock operators there."""

    @property
    def input_name(self) -> str:
        return "ids" if self.kind == "embedding" else "x"

    def stack(self, role: str) -> Stack | None:
        """The stack of a role, where the layer has one."""
        return next((stack for stack in self.stacks if stack.role == role), None)

    def files(self) -> list[str]:
        """The paths of this layer's files inside the artifact."""
        return [path for path in (self.onnx, self.torchscript, self.base_rows) if path]

    def check_sense(self, num_slots: int, in_graph: bool) -> None:
        """Raise ValueError unless slices and stacks tile what they are of.

        Args:
            in_graph: the base's rows need no file of their own.
        """
        where = f"manifest.layers: layer {self.name!r}"
        sizes = (self.in_features, self.out_features, self.max_rank)
        if not self.slices or not all(0 < size <= MAX_SIZE for size in sizes):
            raise ValueError(f"{where} has no slice, or a size that is not 1 to {MAX_SIZE}")
        end = 0
        for part in self.slices:
            if part.offset != end or part.width < 1:
                raise ValueError(f"{where}: its slices do not tile its outputs")
            end += part.width
        if end != self.out_features:
            raise ValueError(f"{where}: its slices do not tile its outputs")
        for stack in self.stacks:
            rows = [0] * num_slots if stack.slot_rows is None else stack.slot_rows
            counts = (stack.row_offset, *rows)
            is_odd = min(counts) < 0 or len(counts) != 1 + num_slots
            if is_odd or stack.rows(num_slots).stop != stack.shape[0]:
                raise ValueError(
                    f"manifest.layers: stack {stack.name!r} has {stack.shape[0]} rows, which"
                    f" {num_slots} slots do not fill"
                )
            has_own = in_graph or self.base_rows is not None
            has_own = has_own and stack.row_offset == stack.rows_per_slot
            if stack.role in PARAMETERS and not has_own:
                raise ValueError(
                    f"manifest.layers: stack {stack.name!r} replaces the base's {stack.role},"
                    " which it does not have"
                )
        self._check_stacks()

    def _check_stacks(self) -> None:
        """Rows and columns of every stack are those that its role has."""
        rank = len(self.slices) * self.max_rank
        first = self.stack("lora_A")
        of_bias = 0 if first is None else first.row_offset
        ahead = self.in_features + of_bias if self.strategy == "augmented" else 0
        # Role -> columns, rows of a slot, rows of the base ahead of them.
        sizes = {
            "lora_A": (self.in_features, rank, of_bias),
            "lora_B": (self.out_features, rank, ahead),
            "rank": (1, 1, 0),
            "output_scale": (self.out_features, 1, 1),
            "bias": (self.out_features, 1, 1),
            "weight": (self.in_features, self.out_features, self.out_features),
        }
        if self.kind == "embedding":
            sizes["lora_A"] = (rank, self.in_features, 0)
            sizes["weight"] = (self.out_features, self.in_features, self.in_features)
        columns: Counter[str] = Counter()
        for stack in self.stacks:
            width, rows, offset = sizes[stack.role]
            known = (rows, offset, columns[stack.role])
            if (stack.rows_per_slot, stack.row_offset, stack.column_offset) != known:
                raise ValueError(
                    f"manifest.layers: stack {stack.name!r} does not lie as a {stack.role} of"
                    f" layer {self.name!r} does"
                )
            columns[stack.role] += stack.shape[1]
            if not 0 < stack.shape[1] <= width:
                raise ValueError(
                    f"manifest.layers: stack {stack.name!r} has {stack.shape[1]} columns"
                )
        short = [role for role, count in columns.items() if count != sizes[role][0]]
        if ("lora_A" in columns) != ("lora_B" in columns):
            short.append("lora_A and lora_B")
        if ("rank" in columns) != (self.function is not None):
            short.append("rank")
        if short or of_bias not in (0, BIAS_ROWS):
            raise ValueError(
                f"manifest.layers: the {(short or ['lora_A'])[0]} stacks of layer {self.name!r} do"
                " not tile it"
            )


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
    """sha256 of each site's base weight, by site; and of embeddings that are none, by module."""
    naming: Naming
    """How adapters that are loaded later may call the sites."""
    missing: tuple[str, ...]
    """Weights of its model that its files lack: of no effect, or brought by every adapter."""


@dataclass(frozen=True)
class ParitySummary:
    status: ParityStatus
    """`deferred`: the ONNX graphs have not been run yet; `loraexport verify` settles it."""
    checked: tuple[str, ...]
    """What was compared with the float64 oracle: eager, torchscript, onnx-cpu, onnx-cuda."""
    max_error: float | None
    """Largest relative error over all of them; None if one is no number, or nothing was run."""
    tolerance: float
    gain_tolerance: float | None = None
    """What was allowed of |gain - 1|; None: nothing was measured, or format 4: the dtype's."""


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
    def functions(self) -> frozenset[Function]:
        """Those that its graphs call."""
        return frozenset(layer.function for layer in self.layers if layer.function is not None)

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
        if not 0 < self.num_slots <= MAX_SLOTS:
            raise ValueError(f"manifest.num_slots: expected 1 to {MAX_SLOTS}, got {self.num_slots}")
        stacks = [stack.name for layer in self.layers for stack in layer.stacks]
        sites = [part.site for layer in self.layers for part in layer.slices]
        for key, names in (
            ("layers", [layer.name for layer in self.layers]),
            ("adapters", [adapter.name for adapter in self.adapters]),
            ("layers: stacks", stacks),
            ("layers: sites", sites),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"manifest.{key}: two of them have one name")
        for layer in self.layers:
            in_graph = isinstance(self.kind, Decoder)
            layer.check_sense(self.num_slots, in_graph)
            ahead = [stack.name for stack in layer.stacks if stack.row_offset]
            if ahead and layer.base_rows is None and not in_graph:
                raise ValueError(
                    f"manifest.layers: stack {ahead[0]!r} begins with the base's rows, and no file"
                    " has them"
                )
        self._check_adapters({*sites})
        if isinstance(self.kind, Model | Graph):
            model = self.kind if isinstance(self.kind, Model) else self.kind.model
            _check_shapes(model.inputs, derived=False)
            _check_shapes(model.outputs, derived=True)

    @property
    def runs_base(self) -> bool:
        """Whether a row may do without an adapter: every head is the base's own."""
        return all(layer.in_base for layer in self.layers)

    def _check_adapters(self, sites: set[str]) -> None:
        slots = [entry.slot for entry in self.adapters if entry.slot is not None]
        if len(set(slots)) < len(slots) or not set(slots) <= set(range(1, self.num_slots + 1)):
            raise ValueError(
                f"manifest.adapters: slots {slots} are not distinct slots of 1 to {self.num_slots}"
            )
        if max(slots, default=0) > len(slots):
            raise ValueError(f"manifest.adapters: slots {sorted(slots)} leave one free among them")
        for entry in self.adapters:
            scales = [entry.scale, *(site.scaling for site in entry.sites.values())]
            if not all(map(math.isfinite, scales)):
                raise ValueError(f"manifest.adapters: a scale of {entry.name!r} is no number")
            if unknown := sorted({*entry.sites, *entry.heads} - sites):
                raise ValueError(
                    f"manifest.adapters: {entry.name!r} has the site {unknown[0]!r}, which no layer"
                    " has"
                )
        bare = {part.site for layer in self.layers if layer.in_base for part in layer.slices}
        if missing := sorted(bare - set(self.base.weights)):
            raise ValueError(f"manifest.base.weights: site {missing[0]!r} is missing")

    def check_files(self, folder: Path) -> None:
        """Compare size and sha256 of every listed file. Raises ArtifactError if one differs."""
        for path, entry in self.files.items():
            file = resolve(folder, path)
            try:
                problem = difference(file, entry)
            except PermissionError as error:
                raise ArtifactError(f"{file}: {reason(error)}") from error
            except OSError as error:
                raise ArtifactError(f"{folder}: a listed file cannot be read: {error}") from error
            if problem:
                raise ArtifactError(f"{file}: {problem}; copy the artifact again")


def _read_json(folder: Path, digest: str | None) -> dict[str, Any]:
    """manifest.json of a format that is known; from format 5 on as its digest says."""
    file = folder / MANIFEST_FILE
    while True:
        try:
            content = read_bounded(file, MAX_MANIFEST)
            require_pinned(file, content, digest)
            data = strict_json(content.decode())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ArtifactError(
                f"{folder}: no {MANIFEST_FILE} here; an artifact is a folder that"
                " 'loraexport build' has published"
            ) from error
        except PermissionError as error:
            raise ArtifactError(f"{file}: {reason(error)}") from error
        except (OSError, ValueError, RecursionError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            raise ArtifactError(
                f"{file}: not readable as JSON ({why}); copy the artifact again, or build it again"
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


def _check_shapes(entries: Iterable[TensorEntry], derived: bool) -> None:
    """Raise ValueError for a dimension that is none."""
    for size in (size for entry in entries for size in entry.shape):
        if not is_dimension(size, MAX_SIZE, derived):
            raise ValueError(f"manifest.kind: {quoted(size)} is no dimension of a model's tensor")


def cuda_reason(dtype: DType, packed: Packed | None) -> str | None:
    """What onnxruntime's CPU provider lacks for graphs of this kind, in words; None: nothing."""
    if dtype == "bfloat16":
        return "onnxruntime's CPU provider has no bfloat16 MatMul"
    if packed == "cuda":
        return "onnxruntime's CPU provider has no PackedMultiHeadAttention"
    return None
