"""An artifact -> a session that runs mixed batches on onnxruntime, and swaps adapters in place."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..buckets.replays import Replays
from ..buckets.sizes import check_sizes
from ..buckets.tokens import TokenBuckets
from ..contract.files import resolve
from ..contract.manifest import Layer, Manifest
from ..device import providers as devices
from ..device.binding import empty_output, run_bound
from ..device.dtypes import NUMPY_DTYPES
from ..device.memory import host_view
from ..device.ort_session import open_session, require_device
from ..errors import ArtifactError, InputError, SegmentsError
from ..slots.batch import Segments, check_segments, read_segments, segment_arrays
from ..slots.host import AdapterHost


class Session(AdapterHost, Mapping[str, "LayerSession"]):
    """The layers of an artifact by name, and the slots that they share. Safe to use from threads.

    session = load("artifacts/quickstart")
    y = session["qkv"].run(x, segments=[("pydoc", 5), (None, 3)])
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        providers: list[tuple[str, dict[str, Any]]],
        threads: int | None,
        cuda_graphs: bool = False,
    ) -> None:
        device = devices.session_device(providers[0])
        require_device(device)
        super().__init__(folder, manifest, device, cuda_graphs)
        if self._replays is not None and self._replays.capture:
            providers = devices.with_cuda_graphs(providers)
        self._layers = {}
        for layer in manifest.layers:
            stacks = {stack.name: self._stacks[stack.name].value for stack in layer.stacks}
            graph = open_session(_graph_path(folder, layer), providers, stacks, threads)
            self._layers[layer.name] = LayerSession(layer, self, graph, device, self._replays)

    def warm_up(self, sizes: Iterable[int]) -> None:
        """`LayerSession.warm_up` of every layer."""
        numbers = [number for (number,) in check_sizes(sizes, "numbers of tokens", 1)]
        for layer in self._layers.values():
            layer.warm_up(numbers)

    def __getitem__(self, name: str) -> "LayerSession":
        if name not in self._layers:
            raise KeyError(f"no layer {name!r} in this artifact; it has {', '.join(self._layers)}")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class LayerSession:
    """One layer's graph: y = W x + b + scaling B (A x), with A and B of each token's slot."""

    def __init__(
        self,
        layer: Layer,
        host: AdapterHost,
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
        self._session = session
        self._device = device

    def run(
        self,
        x: Any,
        segments: Segments | None = None,
        *,
        seg_indptr: np.ndarray | None = None,
        seg_slots: np.ndarray | None = None,
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

        Returns:
            A numpy array for numpy input, else an `onnxruntime.OrtValue` on the device, which
            `torch.from_dlpack` or `cupy.from_dlpack` takes without a copy.

        Raises:
            BatchError: one of UnknownAdapterError, SlotsExceededError, SegmentsError, InputError.
        """
        num_tokens = self._check_input(x)
        if segments is not None and seg_indptr is None and seg_slots is None:
            named = read_segments(segments, num_tokens)
            with self._host.slots.lease(name for name, _ in named) as slots:
                return self._run_graph(x, *segment_arrays(named, slots))
        if segments is not None or seg_indptr is None or seg_slots is None:
            raise SegmentsError("give either segments, or seg_indptr and seg_slots together")
        check_segments(seg_indptr, seg_slots, num_tokens)
        with self._host.slots.lease_slots(seg_slots.tolist()):
            return self._run_graph(x, seg_indptr, seg_slots)

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Take memory and, with `load(…, cuda_graphs=True)`, capture CUDA graphs ahead of runs.

        A run then takes the smallest bucket that holds its tokens, padded with tokens of the base;
        one with more tokens than any, or more segments than a bucket has (twice the slots and 64
        at least; `chunked`: one of each slot and of the base), is computed as ever. Adapters that
        are loaded later are seen by what is captured. Call it before other threads use the device:
        CUDA refuses much of their work during a capture. The thread that calls it replays at
        once; others hand their runs to a thread of the session.

        Args:
            sizes: numbers of tokens.

        Raises:
            InputError: a size is no number from 1 on.
            ProviderError: onnxruntime cannot capture this graph.
        """
        for (num_tokens,) in check_sizes(sizes, "numbers of tokens", 1):
            if self._buckets is not None:
                self._buckets.warm_up(num_tokens)
            else:
                shape: Any = num_tokens, self.layer.in_features
                x = np.zeros(shape, NUMPY_DTYPES[self.dtype])
                if self.layer.kind == "embedding":
                    x = np.zeros(num_tokens, np.int64)
                self.run(x, [(None, num_tokens)])

    def _run_graph(self, x: Any, seg_indptr: np.ndarray, seg_slots: np.ndarray) -> Any:
        shape = [int(seg_indptr[-1]), self.layer.out_features]
        if shape[0] == 0:  # the graphs start at one token
            return empty_output(shape, self.dtype, isinstance(x, np.ndarray), self._device)
        if self._buckets is not None and (sized := self._buckets.find(shape[0], len(seg_slots))):
            return self._buckets.run(sized, x, seg_indptr, seg_slots)
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

    def _check_input(self, x: Any) -> int:
        """The number of tokens. Raises InputError for another shape or dtype."""
        is_ids, size_in = self.layer.kind == "embedding", self.layer.in_features
        if not hasattr(x, "__dlpack__"):
            raise self._refuse(
                f"is of type {type(x).__name__}; expected a numpy array or a DLPack tensor"
            )
        shape = tuple(x.shape() if isinstance(x, ort.OrtValue) else x.shape)
        if not shape or shape[1:] != (() if is_ids else (size_in,)):
            expected = "[num_tokens]" if is_ids else f"[num_tokens, {size_in}]"
            raise self._refuse(f"has shape {list(shape)}; expected {expected}")
        wanted = "int64" if is_ids else self.dtype
        # The name of a dtype takes longer than a comparison.
        if not isinstance(x, np.ndarray) or x.dtype != NUMPY_DTYPES[wanted]:
            found = x.data_type() if isinstance(x, ort.OrtValue) else str(x.dtype)
            found = {"tensor(float)": "float32"}.get(found, found.removeprefix("torch."))
            if found.removeprefix("tensor(").removesuffix(")") != wanted:
                raise self._refuse(f"is {found}; this artifact takes {wanted}, so cast it first")
        ids = host_view(x) if is_ids and shape[0] else None
        if ids is not None and (ids.min() < 0 or ids.max() >= size_in):
            raise self._refuse(
                f"range from {ids.min()} to {ids.max()}; expected 0 to {size_in - 1}, the rows of"
                " this embedding"
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
