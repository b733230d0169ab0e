"""Buckets of a whole model: so many rows of so many tokens, filled up on the right and below."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ..contract.kinds import ADAPTER_WEIGHTS, Model, TensorEntry, sequence_of
from ..device.binding import run_bound
from ..device.memory import device_value
from ..errors import InputError
from .bucket import Bucket
from .padding import MASK, are_same, can_be_padded, region, sample_inputs
from .replays import Replays
from .sizes import check_sizes


@dataclass(frozen=True)
class _Sized:
    rows: int
    tokens: int
    bucket: Bucket
    pads_tokens: bool
    """Shorter texts may be filled up: the model gives the same for them."""


class RowBuckets:
    """A model's buckets, the smallest first."""

    def __init__(
        self,
        session: ort.InferenceSession,
        model: Model,
        num_slots: int,
        first_slot: int,
        device: tuple[str, int],
        replays: Replays,
    ) -> None:
        """`first_slot`: the least that a row may use, 1 where the base has no head of its own."""
        self._session = session
        self._model = model
        self._num_slots = num_slots
        self._first_slot = first_slot
        self._device = device
        self._replays = replays
        self._buckets: list[_Sized] = []

    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """See `ModelSession.warm_up`; (rows, tokens), of `read_sizes`."""
        for rows, tokens in sizes:
            with self._replays.warming_up():
                existing = [
                    sized for sized in self._buckets if (sized.rows, sized.tokens) == (rows, tokens)
                ]
                bucket = existing[0].bucket if existing else self._make(rows, tokens)
                if not self._replays.is_captured_here(bucket):
                    self._replays.warm_up(bucket)
                if not existing:
                    sized = _Sized(rows, tokens, bucket, self._is_neutral(bucket, tokens))
                    # As a whole: other threads look for a bucket without the lock.
                    self._buckets = sorted(
                        [*self._buckets, sized],
                        key=lambda sized: (sized.rows * sized.tokens, sized.rows),
                    )

    def find(self, batch: int, sequence: int, on_host: bool) -> _Sized | None:
        """The smallest bucket that holds a batch. Device tensors are not filled up with tokens."""
        for bucket in self._buckets:
            longer = bucket.tokens > sequence and bucket.pads_tokens and on_host
            if bucket.rows >= batch and (bucket.tokens == sequence or longer):
                return bucket
        return None

    def run(
        self,
        sized: _Sized,
        inputs: Mapping[str, Any],
        batch: int,
        sequence: int,
        on_host: bool,
        adapter_ids: np.ndarray,
        weights: np.ndarray | None,
    ) -> dict[str, Any]:
        """What `run_bound` gives, out of a bucket that `find` gave."""
        bucket = sized.bucket
        values = inputs
        if not on_host:
            values = {name: device_value(inputs[name], self._device, name) for name in inputs}
        with self._replays.running():
            self._replays.num_hits += 1
            self._fill(bucket, values, batch, sequence, adapter_ids, weights)
            if not on_host:
                bucket.binding.synchronize_inputs()
            self._replays.run(bucket)
            if not on_host:
                return {
                    output.name: bucket.copy(output.name, batch) for output in self._model.outputs
                }
            outputs = {
                output.name: bucket.read(output.name, batch) for output in self._model.outputs
            }
        if sequence < sized.tokens:
            for output in self._model.outputs:
                if "sequence" in output.shape:
                    filled = outputs[output.name][region(output.shape, batch, sequence)]
                    outputs[output.name] = np.ascontiguousarray(filled)
        return outputs

    def _fill(
        self,
        bucket: Bucket,
        values: Mapping[str, Any],
        batch: int,
        sequence: int,
        adapter_ids: np.ndarray,
        weights: np.ndarray | None,
    ) -> None:
        later: list[TensorEntry] = []
        for entry in self._model.inputs:
            value = values[entry.name]
            if entry.dtype == "int64" and isinstance(value, np.ndarray):
                rows = bucket.host[entry.name][:batch]
                if value.shape != rows.shape:
                    rows[:] = 0
                    rows = rows[region(entry.shape, batch, sequence)]
                rows[:] = value
            else:
                later.append(entry)
        ids = bucket.host["adapter_ids"]
        ids[:batch] = adapter_ids
        ids[batch:] = self._first_slot and adapter_ids[0]
        bucket.send()
        for entry in later:
            bucket.write(entry.name, values[entry.name])
        if self._model.blend:
            whole_weights = np.zeros((len(ids), self._num_slots), np.float32)
            if weights is not None:
                whole_weights[:batch] = weights
            bucket.write(ADAPTER_WEIGHTS, whole_weights)

    def _make(self, rows: int, tokens: int) -> Bucket:
        """A bucket whose every row is valid: its first token, at least, is not masked."""
        inputs: dict[str, tuple[Sequence[int], str]] = {
            entry.name: (entry.sizes(rows, tokens), entry.dtype) for entry in self._model.inputs
        }
        inputs["adapter_ids"] = ([rows], "int64")
        if self._model.blend:
            inputs[ADAPTER_WEIGHTS] = ([rows, self._num_slots], "float32")
        outputs = {
            output.name: (output.sizes(rows, tokens), output.dtype)
            for output in self._model.outputs
        }
        options = self._replays.next_options()
        bucket = Bucket(self._session, inputs, outputs, self._device, options)
        if MASK in bucket.host:
            bucket.host[MASK][:] = 1
        bucket.host["adapter_ids"][:] = self._first_slot
        bucket.send()
        return bucket

    def _is_neutral(self, bucket: Bucket, tokens: int) -> bool:
        """Whether texts of a half, a quarter, … of the tokens give what they give unpadded."""
        if not can_be_padded(self._model):
            return False
        adapter_ids = np.full(1, self._first_slot, np.int64)
        while (tokens := tokens // 2) > 0:
            inputs = sample_inputs(self._model, 1, tokens)
            plain = self._run_plain(inputs, tokens, adapter_ids)
            self._fill(bucket, inputs, 1, tokens, adapter_ids, None)
            self._replays.run(bucket)
            padded = {output.name: bucket.read(output.name, 1) for output in self._model.outputs}
            if not are_same(self._model, padded, plain, tokens):
                return False
        return True

    def _run_plain(
        self, inputs: Mapping[str, np.ndarray], tokens: int, adapter_ids: np.ndarray
    ) -> dict[str, Any]:
        tensors = {entry.name: (inputs[entry.name], entry.dtype) for entry in self._model.inputs}
        outputs = {
            output.name: (output.sizes(1, tokens), output.dtype) for output in self._model.outputs
        }
        control = {"adapter_ids": adapter_ids}
        options = self._replays.plain_options
        return run_bound(self._session, tensors, control, outputs, self._device, options)


def read_sizes(model: Model, sizes: Any) -> list[tuple[int, int]]:
    """(rows, tokens) of the sizes that `ModelSession.warm_up` was given. Raises InputError."""
    if any("sequence" in entry.shape for entry in model.inputs):
        pairs = check_sizes(sizes, "(rows, tokens per row)", 2)
        least = sequence_of(model.outputs, 1)
        if short := [tokens for _, tokens in pairs if tokens < least]:
            raise InputError(f"sizes has rows of {short[0]}; this model takes {least} at least")
        return [(rows, tokens) for rows, tokens in pairs]
    return [(rows, 1) for (rows,) in check_sizes(sizes, "numbers of rows", 1)]
