"""What several requests are as one run of a session, and what each gets of its outputs.

A model's requests are rows, filled up on the right to the longest, masked; a layer's are segments,
one behind the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..buckets.padding import are_same, can_be_padded, sample_inputs
from ..contract.kinds import TensorEntry
from ..device.dtypes import NUMPY_DTYPES
from ..errors import InputError
from ..sessions.layers import LayerSession
from ..sessions.model import ModelSession
from ..slots.batch import RowAdapters
from .choice import BatchCost

_TRIED = 12
"""Tokens of the longer of two texts with which it is tried whether padding changes anything."""

_CUDA_STEP = 8
"""On CUDA a batch has a multiple of so many tokens a row: a shape that is new takes four times as
long, while cuBLAS looks for its kernels."""

Spread = tuple[int, int]
"""The least and the most tokens of a request."""


@dataclass(frozen=True)
class Part:
    """One request's share of a run."""

    inputs: Mapping[str, np.ndarray]
    adapter: RowAdapters
    length: int
    """Tokens; 1 where the inputs have none."""


class Joint(Protocol):
    """How a session runs several requests at once."""

    num_slots: int

    def read(self, inputs: Any, adapter: RowAdapters) -> Part:
        """One request, checked. Raises InputError."""

    def padded(self, lengths: Sequence[int]) -> int:
        """The tokens that a run of parts of these lengths computes."""

    def spread(self, first: Part, others: Sequence[int], rows: int, tokens: int) -> Spread:
        """Of which lengths requests are to go with a first one.

        Args:
            others: the lengths of those that wait.
            rows, tokens: the most of a batch, padding counted.
        """

    def note(self, tokens: int, seconds: float) -> None:
        """A run of so many tokens, padding counted, took so long."""

    def run(self, parts: Sequence[Part]) -> list[Any]:
        """What each gets."""


class JointRows:
    """Rows of a whole model."""

    def __init__(self, session: ModelSession) -> None:
        self.num_slots = session.manifest.num_slots
        self._session = session
        self._inputs = {entry.name: entry for entry in session.model.inputs}
        self._fills = dict.fromkeys(self._inputs, 0) | {
            "input_ids": session.model.facts.pad_token_id or 0
        }
        self._cost = BatchCost()
        self._step = 1
        self._pads = can_be_padded(session.model) and self._is_neutral()
        if self._pads and session.host.device[0] == "cuda":
            self._step = _CUDA_STEP

    def read(self, inputs: Any, adapter: RowAdapters) -> Part:
        """See Joint."""
        if not isinstance(inputs, Mapping) or inputs.keys() != self._inputs.keys():
            names = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise InputError(f"inputs are {names}; this model takes {list(self._inputs)}")
        arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, int] = {}
        for name, entry in self._inputs.items():
            arrays[name] = _read_row(inputs[name], entry, sizes)
        return Part(arrays, adapter, sizes.get("sequence", 1))

    def padded(self, lengths: Sequence[int]) -> int:
        """See Joint."""
        return len(lengths) * self._width(max(lengths))

    def spread(self, first: Part, others: Sequence[int], rows: int, tokens: int) -> Spread:
        """See Joint: of like length, so that little is padding; of one where it would count."""
        if not self._pads:
            return first.length, first.length
        return self._cost.choose(first.length, others, rows, tokens)

    def note(self, tokens: int, seconds: float) -> None:
        """See Joint."""
        self._cost.note(tokens, seconds)

    def run(self, parts: Sequence[Part]) -> list[dict[str, np.ndarray]]:
        """See Joint."""
        longest = self._width(max(part.length for part in parts))
        batch = {}
        for name, entry in self._inputs.items():
            shape = entry.sizes(len(parts), longest)
            joined = np.full(shape, self._fills[name], NUMPY_DTYPES[entry.dtype])
            for row, part in enumerate(parts):
                joined[row][_own(entry, part.length)] = part.inputs[name]
            batch[name] = joined
        outputs = self._session.run(batch, [part.adapter for part in parts])
        return [
            {
                output.name: outputs[output.name][row][_own(output, part.length)].copy()
                for output in self._session.model.outputs
            }
            for row, part in enumerate(parts)
        ]

    def _width(self, longest: int) -> int:
        """So many tokens has a batch whose longest text has so many."""
        width = -(-longest // self._step) * self._step
        return max(longest, min(width, self._session.model.facts.positions or width))

    def _is_neutral(self) -> bool:
        """Whether a shorter text gives beside a longer one what it gives alone."""
        model = self._session.model
        adapter = None
        if not self._session.manifest.runs_base:
            adapter = next(iter(self._session.list_adapters()), None)
            if adapter is None:
                return False  # no row can be run yet
        longer = min(_TRIED, model.facts.positions or _TRIED)
        shorter = -(-longer * 2 // 3)
        parts = []
        for tokens in (shorter, longer):
            sample = sample_inputs(model, 1, tokens)
            row = {name: values[0] for name, values in sample.items()}
            parts.append(Part(row, adapter, tokens))
        beside, alone = (
            {name: y[None] for name, y in self.run(run)[0].items()} for run in (parts, parts[:1])
        )
        return are_same(model, beside, alone, shorter)


class JointSegments:
    """Segments of a layer's tokens."""

    def __init__(self, layer: LayerSession) -> None:
        self.num_slots = layer.host.manifest.num_slots
        self._layer = layer

    def read(self, inputs: Any, adapter: RowAdapters) -> Part:
        """See Joint."""
        if not isinstance(inputs, np.ndarray):
            raise InputError(
                f"layer {self._layer.layer.name!r}: {self._layer.layer.input_name} is of type"
                f" {type(inputs).__name__}; expected a numpy array"
            )
        if isinstance(adapter, Mapping):
            raise InputError("the adapter is a blend; a layer's segment takes one name, or None")
        return Part({"x": inputs.copy()}, adapter, self._layer.check_input(inputs))

    def padded(self, lengths: Sequence[int]) -> int:
        """See Joint."""
        return sum(lengths)

    def spread(self, first: Part, others: Sequence[int], rows: int, tokens: int) -> Spread:
        """See Joint: nothing is padded."""
        return 0, max(others, default=0)

    def note(self, tokens: int, seconds: float) -> None:
        """See Joint."""

    def run(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """See Joint."""
        x = np.concatenate([part.inputs["x"] for part in parts])
        segments: Any = [(part.adapter, part.length) for part in parts]
        y = self._layer.run(x, segments)
        ends = np.cumsum([part.length for part in parts])[:-1]
        return [rows.copy() for rows in np.split(y, ends)]


def _read_row(value: Any, entry: TensorEntry, sizes: dict[str, int]) -> np.ndarray:
    """A row of an input, in the graph's dtype; `sizes` of the row's named dimensions."""
    dtype = NUMPY_DTYPES[entry.dtype]
    array = np.array(value) if isinstance(value, list | tuple) else value
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{entry.name} is of type {type(value).__name__}; expected a numpy array of one row"
        )
    if array.dtype != dtype:
        raise InputError(f"{entry.name} is {array.dtype}; this model takes {entry.dtype}")
    dims = entry.shape[1:]
    fits = len(dims) == array.ndim
    for name, size in zip(dims, array.shape if fits else (), strict=False):
        fits &= size == (sizes.setdefault(name, size) if name.isalpha() else int(name))
    if not fits or 0 in array.shape:
        expected = ", ".join(str(sizes.get(name, name)) for name in dims)
        raise InputError(
            f"{entry.name} of one row has shape {list(array.shape)}; expected [{expected}], none of"
            " them 0, without the batch"
        )
    return array.copy()  # the caller may write into it before it runs


def _own(entry: TensorEntry, length: int) -> tuple[slice, ...]:
    """What of a row of a batch is not padding."""
    return tuple(slice(length) if size == "sequence" else slice(None) for size in entry.shape[1:])
