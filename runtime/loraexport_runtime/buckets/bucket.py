"""Batches padded to a few fixed sizes over fixed memory, so that CUDA graphs can replay them."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from math import prod
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime as ort

from ..contract.manifest import Manifest
from ..device.binding import run_bound
from ..device.providers import NUMPY_DTYPES, ONNX_TYPES, graph_options, host_value, rows_view
from ..errors import InputError, ProviderError

Tensors = Mapping[str, tuple[Sequence[int], str]]
"""Name -> shape and dtype."""

_ALIGNED = 32
"""Arrays in one block start at a multiple of so many elements: 256 bytes, as CUDA likes it."""
_VIEWS = 4096
"""A bucket keeps so many views of its first rows."""


class Bucket:
    """One size of batch: memory of its own, bound once. What a batch does not fill is padding.

    Padding holds what an earlier batch left there, so it is as valid as a batch is, and its outputs
    are never read. Not for two threads at once: hold `Replays.lock`.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Tensors,
        outputs: Tensors,
        device: tuple[str, int],
        options: ort.RunOptions | None,
    ) -> None:
        """
        Args:
            inputs: those of int64 lie in one block, which one copy brings to the device.
            options: with the id of the graph to capture; None: nothing is captured.
        """
        self.session, self.options = session, options
        self.size = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in inputs.items())
        self.binding = session.io_binding()
        self._device = device
        self._tensors = {**inputs, **outputs}
        self._places: dict[str, tuple[ort.OrtValue, int]] = {}
        self._views: dict[tuple[str, int, str], ort.OrtValue] = {}
        self._place_block([name for name, (_, dtype) in inputs.items() if dtype == "int64"])
        for name, (shape, dtype) in self._tensors.items():
            if name in self._places:
                continue
            self._places[name] = (self._allocate(shape, dtype), 0)
            if name in inputs:
                zeros = np.zeros(shape, NUMPY_DTYPES[dtype])
                self._places[name][0].update_inplace(host_value(zeros, dtype))
                self.binding.bind_ortvalue_input(name, self._places[name][0])
            else:
                self.binding.bind_ortvalue_output(name, self._places[name][0])

    def _place_block(self, names: Sequence[str]) -> None:
        sizes = [-(-prod(self._tensors[name][0]) // _ALIGNED) * _ALIGNED for name in names]
        starts = np.cumsum([0, *sizes]).tolist()
        self._staged = np.zeros(starts[-1], np.int64)
        self._block = self._allocate([starts[-1]], "int64")
        self.host: dict[str, np.ndarray] = {}
        """The int64 inputs, to be filled on the host ahead of `send`."""
        for name, start in zip(names, starts, strict=False):
            shape = list(self._tensors[name][0])
            self.host[name] = self._staged[start : start + prod(shape)].reshape(shape)
            self._places[name] = (self._block, start)
            address = self._block.data_ptr() + start * 8
            self.binding.bind_input(name, *self._device, ONNX_TYPES["int64"], shape, address)

    def send(self) -> None:
        """Copy the int64 inputs from `host` to the device."""
        self._block.update_inplace(self._staged)

    def write(self, name: str, rows: np.ndarray | ort.OrtValue) -> None:
        """Overwrite the first rows of an input; an int64 one on the device after `send` only."""
        view = self._rows(name, rows.shape[0] if isinstance(rows, np.ndarray) else rows.shape()[0])
        if isinstance(rows, np.ndarray):
            rows = host_value(np.ascontiguousarray(rows), self._tensors[name][1])
        view.update_inplace(rows)

    def read(self, name: str, num_rows: int) -> np.ndarray:
        """The first rows of an output, as an array of the caller's own."""
        shape, dtype = self._tensors[name]
        # numpy knows no bfloat16, and onnxruntime does not know ml_dtypes' one.
        carried = "float16" if dtype == "bfloat16" else dtype
        found = self._rows(name, num_rows, carried).numpy()
        if self._device[0] == "cpu":
            found = found.copy()  # onnxruntime gives its own memory there
        return found.view(NUMPY_DTYPES[dtype]).reshape(num_rows, *shape[1:])

    def copy(self, name: str, num_rows: int) -> ort.OrtValue:
        """The first rows of an output, as device memory of the caller's own."""
        shape, dtype = self._tensors[name]
        found = self._allocate([num_rows, *shape[1:]], dtype)
        found.update_inplace(self._rows(name, num_rows))
        # A copy on the device need not have ended, and the caller may read on any stream.
        self.binding.synchronize_outputs()
        return found

    def _rows(self, name: str, num_rows: int, carried: str | None = None) -> ort.OrtValue:
        """The first rows as a matrix, which is a view; `carried`: as another dtype of its size."""
        shape, dtype = self._tensors[name]
        key = (name, num_rows, carried or dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            memory, start = self._places[name]
            if start % (width := prod(shape[1:])):
                rows, width = slice(start, start + num_rows * width), 1
            else:
                rows = slice(start // width, start // width + num_rows)
            view = self._views[key] = rows_view(memory, rows, width, carried or dtype)
        return view

    def _allocate(self, shape: Sequence[int], dtype: str) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), ONNX_TYPES[dtype], *self._device
        )


class Replays:
    """Runs of sessions that capture CUDA graphs, one at a time.

    onnxruntime keeps a captured graph with the thread that made it. So a bucket is captured twice:
    by the thread that warms it up, which replays it without a detour, and by a thread of our own,
    which replays it for all others. Graphs and plain runs of a session compute in the same memory,
    and no thread may copy to the device while another one captures: hence one lock.
    """

    def __init__(self, capture: bool) -> None:
        """`capture`: False on a device without CUDA graphs, where buckets run as they are."""
        self.capture = capture
        self.lock = threading.Lock()
        self.plain_options = graph_options(-1) if capture else None
        self._ids = count(1)
        self._mine = threading.local()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loraexport-replay")

    def next_options(self) -> ort.RunOptions | None:
        """For the graph of a new bucket; no id is given twice."""
        return graph_options(next(self._ids)) if self.capture else None

    def warm_up(self, bucket: Bucket) -> None:
        """Capture a bucket. Hold `lock`.

        Raises:
            ProviderError: onnxruntime cannot capture this graph.
        """
        try:
            for _ in range(2):  # onnxruntime takes its memory first, and captures then
                self._worker.submit(_run, bucket).result()
            for _ in range(2):
                _run(bucket)
        except Exception as error:
            raise ProviderError(
                f"onnxruntime {ort.__version__} cannot run or capture this graph with"
                f" {bucket.size}: {error}. Do not warm up more tokens per row than the model"
                " takes; or open the artifact again, without cuda_graphs"
            ) from error
        self._mine.__dict__.setdefault("buckets", WeakSet()).add(bucket)

    def is_captured_here(self, bucket: Bucket) -> bool:
        return bucket in self._mine.__dict__.get("buckets", ())

    def run(self, bucket: Bucket) -> None:
        """Replay a bucket over what was written into it. Hold `lock`."""
        if self.is_captured_here(bucket):
            _run(bucket)
        else:
            self._worker.submit(_run, bucket).result()

    def run_plain(
        self,
        session: ort.InferenceSession,
        tensors: Mapping[str, tuple[Any, str]],
        control: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[list[int], str]],
        device: tuple[str, int],
    ) -> dict[str, Any]:
        """`run_bound`, captured by nobody."""
        with self.lock:
            return run_bound(session, tensors, control, outputs, device, self.plain_options)


def _run(bucket: Bucket) -> None:
    bucket.session.run_with_iobinding(bucket.binding, bucket.options)


def check_capturable(manifest: Manifest) -> None:
    """Raise ProviderError for a graph whose shapes depend on values."""
    for layer in manifest.layers:
        if layer.strategy == "segmented":
            raise ProviderError(
                f"layer {layer.name!r} is computed by the strategy 'segmented', whose shapes depend"
                " on the batch, so no CUDA graph can hold it; build with another export.strategy,"
                " or pass no cuda_graphs"
            )


def check_sizes(sizes: Any, what: str, num_parts: int) -> list[tuple[int, ...]]:
    """The sizes that `warm_up` was given, each as a tuple of `num_parts` numbers.

    Raises InputError.
    """
    expected = f"expected a list such as {[64, 512] if num_parts == 1 else [(32, 128), (64, 512)]}"
    if isinstance(sizes, str | Mapping | int | np.integer) or not hasattr(sizes, "__iter__"):
        raise InputError(f"warm_up: {sizes!r}; {expected}, of {what}")
    found = []
    for index, size in enumerate(sizes):
        parts = size if isinstance(size, tuple | list) else (size,)
        if len(parts) != num_parts or not all(map(_is_count, parts)):
            raise InputError(f"warm_up: sizes[{index}] is {size!r}; {expected}, of {what}")
        found.append(tuple(int(part) for part in parts))
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0
