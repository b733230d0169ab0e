"""Captured runs: one at a time, each in the thread that captured it."""

import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime as ort

from ..contract.manifest import Manifest
from ..device.binding import run_bound
from ..device.captures import capturing, using
from ..device.providers import graph_options
from ..errors import ProviderError
from .bucket import Bucket

_LOG = logging.getLogger(__name__)


class Replays:
    """Runs of sessions that capture CUDA graphs, one at a time.

    onnxruntime keeps a captured graph with the thread that made it. So a bucket is captured twice:
    by the thread that warms it up, which replays it without a detour, and by a thread of our own,
    which replays it for all others. Graphs and plain runs of a session compute in the same memory:
    hence one lock.
    """

    def __init__(self, device: tuple[str, int]) -> None:
        self._device = device
        self.capture = capture = device[0] == "cuda"
        """False on a device without CUDA graphs, where buckets run as they are."""
        self._lock = threading.Lock()
        self.plain_options = graph_options(-1) if capture else None
        self.num_hits = self.num_misses = 0
        """Runs in a bucket, and those that fitted into none; changed in `running`."""
        self._ids = count(1)
        self._mine = threading.local()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loraexport-replay")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold it while a bucket or a plain run computes."""
        with self._lock, using(self._device):
            yield

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Hold it while buckets are made and captured."""
        with self._lock, capturing(self._device):
            yield

    def next_options(self) -> ort.RunOptions | None:
        """For the graph of a new bucket; no id is given twice."""
        return graph_options(next(self._ids)) if self.capture else None

    def warm_up(self, bucket: Bucket) -> None:
        """Capture a bucket. Hold `warming_up`.

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
        _LOG.info("%s a bucket of %s", "captured" if self.capture else "warmed up", bucket.size)

    def is_captured_here(self, bucket: Bucket) -> bool:
        return bucket in self._mine.__dict__.get("buckets", ())

    def run(self, bucket: Bucket) -> None:
        """Replay a bucket over what was written into it. Hold `running`."""
        if self.is_captured_here(bucket):
            _run(bucket)
        else:
            self._worker.submit(_run, bucket).result()

    def close(self) -> None:
        """End the thread; nobody may run any more."""
        self._worker.shutdown()

    def run_plain(
        self,
        session: ort.InferenceSession,
        tensors: Mapping[str, tuple[Any, str]],
        control: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[list[int], str]],
        device: tuple[str, int],
    ) -> dict[str, Any]:
        """`run_bound`, captured by nobody."""
        with self.running():
            self.num_misses += 1
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
