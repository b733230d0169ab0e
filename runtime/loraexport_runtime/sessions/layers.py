"""Layers whose tokens use different adapters, each layer a graph of its own."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..buckets.replays import Replays
from ..buckets.sizes import check_sizes
from ..buckets.tokens import TokenBuckets
from ..contract.files import resolve
from ..contract.manifest import Layer, Manifest, Stack
from ..device.binding import empty_output, run_bound
from ..device.dtypes import NUMPY_DTYPES
from ..device.kernels import Kernels
from ..device.memory import dtype_of, host_view, shape_of
from ..device.ort_session import open_session
from ..errors import ArtifactError, InputError, SegmentsError, UnknownLayerError
from ..slots.batch import Segments, check_segments, read_segments, segment_arrays
from ..slots.gate import Gate
from ..slots.host import AdapterHost
from .session import ArtifactSession

_LOG = logging.getLogger(__name__)


class LayersSession(ArtifactSession, Mapping[str, "LayerSession"]):
    """The layers of an artifact by name, and the slots that they share.

    with load_layers("artifacts/quickstart") as session:
        y = session["qkv"].run(x, segments=[("pydoc", 5), (None, 3)])

    Threads: as `ArtifactSession` says; layers run at the same time too. A load is seen by the runs
    that begin later, so that two layers of one forward pass may see two generations of an adapter:
    hold them to one with a pin and your own lock, or give a new version a new name.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        providers: list[tuple[str, dict[str, Any]]],
        threads: int | None,
        cuda_graphs: bool = False,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(folder, manifest, providers, cuda_graphs, kernels)
        self._layers = {}
        for layer in manifest.layers:
            stacks = {stack.name: self._host.stack(stack.name) for stack in layer.stacks}
            path = _graph_path(folder, layer)
            library = self._kernels.library
            graph = open_session(path, self._providers, stacks, threads, library)
            self._layers[layer.name] = LayerSession(
                layer, self._host, self._gate, graph, self._device, self._replays
            )

    def warm_up(self, sizes: Iterable[int]) -> None:
        """`LayerSession.warm_up` of every layer."""
        numbers = [number for (number,) in check_sizes(sizes, "numbers of tokens", 1)]
        for layer in self._layers.values():
            layer.warm_up(numbers)

    def __getitem__(self, name: str) -> "LayerSession":
        if name not in self._layers:
            raise UnknownLayerError(
                f"no layer {name!r} in this artifact; it has {', '.join(self._layers)}"
            )
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _graph_stacks(self) -> Mapping[str, tuple[Stack, ...]]:
        layers = self.manifest.layers
        return {Path(layer.onnx).stem: layer.stacks for layer in layers if layer.onnx}

    def _drop_graphs(self) -> None:
        for layer in self._layers.values():
            layer.drop_graph()


class LayerSession:
    """One layer's graph: y = W x + b + scaling B (A x), with A and B of each token's slot.

    Threads: runs may overlap with each other and with every method of the session that it is of,
    but for `warm_up`; it is closed with the session. See `ArtifactSession`.
    """

    def __init__(
        self,
        layer: Layer,
        host: AdapterHost,
        gate: Gate,
        session: ort.InferenceSession,
        device: tuple[str, int],
        replays: Replays | None,
    ) -> None:
        self.layer = layer
        self.dtype = host.manifest.dtype
        self._replays = replays
        self._buckets = None
        if replays is not None:
            slots = host.manifest.num_slots
            self._buckets = TokenBuckets(session, layer, self.dtype, slots, device, replays)
        self._host = host  # also keeps alive the stacks that the graph reads
        self._gate = gate
        self._session: ort.InferenceSession | None = session
        self._device = device

    def run(
        self,
        x: Any,
        segments: Segments | None = None,
        *,
        seg_indptr: np.ndarray | None = None,
        seg_slots: np.ndarray | None = None,
        timeout: float | None = None,
    ) -> Any:
        """y [num_tokens, out_features] for x [num_tokens, in_features], or ids [num_tokens].

        Args:
            x: a numpy array of the artifact's dtype (bfloat16 as `ml_dtypes.bfloat16`; int64 ids
                for an embedding), or any DLPack tensor on the session's device, used without a
                copy (but copied on the device into a bucket, see `warm_up`). Ids on a CUDA device
                are not checked: that would wait for the device.
            segments: (adapter name, number of tokens) in order; None names the base. No tokens
                give no rows.
            seg_indptr: int64 [n + 1], the segments' offsets; beside seg_slots, in place of names.
            seg_slots: int64 [n], their slot numbers. Pin those adapters: a load or another batch
                may page others into their slots.
            timeout: seconds to wait for slots, where other runs hold them; None: as long as it
                takes.

        Returns:
            A numpy array for numpy input, else an `onnxruntime.OrtValue` on the device, which
            `torch.from_dlpack` or `cupy.from_dlpack` takes without a copy.

        Raises:
            BatchError: one of UnknownAdapterError, SlotsExceededError, SlotTimeoutError,
                SegmentsError, InputError.
            ClosedError: the session is closed.
        """
        with self._gate.entry(), self._gate:
            num_tokens = self.check_input(x)
            if segments is not None and seg_indptr is None and seg_slots is None:
                pairs = read_segments(segments, num_tokens)
                with self._host.slots.lease((name for name, _ in pairs), timeout) as slots:
                    return self._run_graph(x, *segment_arrays(pairs, slots))
            if segments is not None or seg_indptr is None or seg_slots is None:
                raise SegmentsError("give either segments, or seg_indptr and seg_slots together")
            check_segments(seg_indptr, seg_slots, num_tokens)
            with self._host.slots.lease_slots(seg_slots.tolist(), timeout):
                return self._run_graph(x, seg_indptr, seg_slots)

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Take memory and, with `load(…, cuda_graphs=True)`, capture CUDA graphs ahead of runs.

        A run then takes the smallest bucket that holds its tokens, padded with tokens of the base;
        one with more tokens than any, or more segments than a bucket has (twice the slots and 64
        at least; `chunked`: one of each slot and of the base), is computed as ever. Adapters that
        are loaded later are seen by what is captured. No thread of another library may use the
        device meanwhile: CUDA refuses much of its work during a capture. The thread that calls it
        replays at once; others hand their runs to a thread of the session.

        Args:
            sizes: numbers of tokens.

        Raises:
            InputError: a size is no number from 1 on.
            ProviderError: onnxruntime cannot capture this graph.
            ClosedError: the session is closed.
        """
        with self._gate.entry(), self._gate:
            for (num_tokens,) in check_sizes(sizes, "numbers of tokens", 1):
                if self._buckets is not None:
                    self._buckets.warm_up(num_tokens)
                    continue
                shape: Any = num_tokens, self.layer.in_features
                x = np.zeros(shape, NUMPY_DTYPES[self.dtype])
                if self.layer.kind == "embedding":
                    x = np.zeros(num_tokens, np.int64)
                indptr = np.array([0, num_tokens], np.int64)
                self._run_graph(x, indptr, np.zeros(1, np.int64))

    def drop_graph(self) -> None:
        """Let go of the graph, for good; the session's gate keeps later runs out."""
        self._session = self._buckets = None

    def _run_graph(self, x: Any, seg_indptr: np.ndarray, seg_slots: np.ndarray) -> Any:
        shape = [int(seg_indptr[-1]), self.layer.out_features]
        if shape[0] == 0:  # the graphs start at one token
            return empty_output(shape, self.dtype, isinstance(x, np.ndarray), self._device)
        if self._buckets is not None:
            if sized := self._buckets.find(shape[0], len(seg_slots)):
                return self._buckets.run(sized, x, seg_indptr, seg_slots)
            _LOG.debug(
                "layer %r: no bucket holds %d tokens in %d segments, which run as they are",
                self.layer.name,
                shape[0],
                len(seg_slots),
            )
        assert self._session is not None, "the gate lets nobody in once it is closed"
        ids = self.layer.kind == "embedding"
        run = run_bound if self._replays is None else self._replays.run_plain
        outputs = run(
            self._session,
            {self.layer.input_name: (x, "int64" if ids else self.dtype)},
            {"seg_indptr": seg_indptr, "seg_slots": seg_slots},
            {"y": (shape, self.dtype)},
            self._device,
        )
        return outputs["y"]

    @property
    def host(self) -> AdapterHost:
        """What holds the adapters."""
        return self._host

    def check_input(self, x: Any) -> int:
        """The number of tokens. Raises InputError for another shape or dtype."""
        is_ids, size_in = self.layer.kind == "embedding", self.layer.in_features
        if not hasattr(x, "__dlpack__"):
            raise self._refuse(
                f"is of type {type(x).__name__}; expected a numpy array or a DLPack tensor"
            )
        shape = shape_of(x)
        if not shape or shape[1:] != (() if is_ids else (size_in,)):
            expected = "[num_tokens]" if is_ids else f"[num_tokens, {size_in}]"
            raise self._refuse(f"has shape {list(shape)}; expected {expected}")
        expected_dtype = "int64" if is_ids else self.dtype
        # The name of a dtype takes longer than a comparison.
        if not isinstance(x, np.ndarray) or x.dtype != NUMPY_DTYPES[expected_dtype]:
            dtype = dtype_of(x)
            if dtype != expected_dtype:
                raise self._refuse(
                    f"is {dtype}; this artifact takes {expected_dtype}, so cast it first"
                )
        ids = host_view(x) if is_ids and shape[0] else None
        if ids is not None and (ids.min() < 0 or ids.max() >= size_in):
            token = int(np.flatnonzero((ids < 0) | (ids >= size_in))[0])
            raise self._refuse(
                f"range from {ids.min()} to {ids.max()}, the first wrong one at token {token};"
                f" expected 0 to {size_in - 1}, the rows of this embedding"
            )
        return int(shape[0])

    def _refuse(self, problem: str) -> InputError:
        return InputError(f"layer {self.layer.name!r}: {self.layer.input_name} {problem}")


def _graph_path(folder: Path, layer: Layer) -> Path:
    if layer.onnx is None:
        raise ArtifactError(
            f"{folder}: layer {layer.name!r} has no ONNX graph; add onnx to export.formats and"
            " build again"
        )
    return resolve(folder, layer.onnx)
