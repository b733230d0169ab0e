"""Buckets of a layer: so many tokens, of which those that a batch does not bring are the base's."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ..contract.manifest import Layer
from ..device.memory import device_value
from .bucket import Bucket
from .replays import Replays


@dataclass(frozen=True)
class _Sized:
    tokens: int
    segments: int
    """The most that a batch may have; one more is there for the padding."""
    bucket: Bucket


class TokenBuckets:
    """A layer's buckets, the smallest first."""

    def __init__(
        self,
        session: ort.InferenceSession,
        layer: Layer,
        dtype: str,
        num_slots: int,
        device: tuple[str, int],
        replays: Replays,
    ) -> None:
        self._session = session
        self._layer = layer
        self._dtype = dtype
        self._num_slots = num_slots
        self._device = device
        self._replays = replays
        self._buckets: list[_Sized] = []

    def warm_up(self, num_tokens: int) -> None:
        """Capture a bucket of so many tokens. Raises ProviderError: onnxruntime cannot."""
        with self._replays.warming_up():
            existing = [bucket for bucket in self._buckets if bucket.tokens == num_tokens]
            sized = existing[0] if existing else self._make(num_tokens)
            if not self._replays.is_captured_here(sized.bucket):
                self._replays.warm_up(sized.bucket)
            if not existing:
                # As a whole: other threads look for a bucket without the lock.
                self._buckets = sorted([*self._buckets, sized], key=lambda bucket: bucket.tokens)

    def find(self, num_tokens: int, num_segments: int) -> _Sized | None:
        """The smallest bucket that holds a batch."""
        for bucket in self._buckets:
            if bucket.tokens >= num_tokens and bucket.segments >= num_segments:
                return bucket
        return None

    def run(self, sized: _Sized, x: Any, seg_indptr: np.ndarray, seg_slots: np.ndarray) -> Any:
        """What `run_bound` gives, out of a bucket that `find` gave."""
        bucket, num_tokens = sized.bucket, int(seg_indptr[-1])
        on_host, name = isinstance(x, np.ndarray), self._layer.input_name
        if not on_host:
            x = device_value(x, self._device, name)
        with self._replays.running():
            self._replays.num_hits += 1
            indptr, slots = bucket.host["seg_indptr"], bucket.host["seg_slots"]
            indptr[: len(seg_indptr)] = seg_indptr
            indptr[len(seg_indptr) :] = sized.tokens  # what is left is one segment, then empty ones
            slots[: len(seg_slots)] = seg_slots
            slots[len(seg_slots) :] = 0
            if on_host and name in bucket.host:
                bucket.host[name][:num_tokens] = x
                bucket.send()
            else:
                bucket.send()
                bucket.write(name, x)
            if not on_host:
                bucket.binding.synchronize_inputs()
            self._replays.run(bucket)
            return bucket.read("y", num_tokens) if on_host else bucket.copy("y", num_tokens)

    def _make(self, num_tokens: int) -> _Sized:
        layer = self._layer
        # For `chunked` every segment is a chunk of 64 tokens more, whether it has any or not.
        most = self._num_slots + 1
        if layer.strategy != "chunked":
            most = max(2 * most, 64)
        most = min(num_tokens, most)
        is_ids = layer.kind == "embedding"
        shape = [num_tokens] if is_ids else [num_tokens, layer.in_features]
        inputs = {
            layer.input_name: (shape, "int64" if is_ids else self._dtype),
            "seg_indptr": ([most + 2], "int64"),
            "seg_slots": ([most + 1], "int64"),
        }
        outputs = {"y": ([num_tokens, layer.out_features], self._dtype)}
        options = self._replays.next_options()
        bucket = Bucket(self._session, inputs, outputs, self._device, options)
        bucket.host["seg_indptr"][1:] = num_tokens
        bucket.send()
        return _Sized(num_tokens, most, bucket)
