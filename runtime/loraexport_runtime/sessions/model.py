"""A whole model whose rows use different adapters."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..adapters.packing import lowest
from ..buckets.padding import sample_inputs
from ..buckets.rows import RowBuckets, read_sizes
from ..contract.files import resolve
from ..contract.kinds import ADAPTER_WEIGHTS, Model, sequence_of
from ..contract.manifest import Manifest, Stack
from ..device import providers as devices
from ..device.binding import run_bound
from ..device.dtypes import NUMPY_DTYPES
from ..device.kernels import Kernels
from ..device.memory import dtype_of, shape_of
from ..device.ort_session import open_session
from ..errors import ArtifactError, InputError, ProviderError
from ..slots.batch import RowAdapters, are_plain, read_rows, row_arrays, row_names
from .session import ArtifactSession
from .tokens import check_length, check_tokens

_LOG = logging.getLogger(__name__)


class ModelSession(ArtifactSession):
    """One graph of a whole model, and its slots.

    with load_model("artifacts/minilm") as session:
        out = session.run({"input_ids": ids, "attention_mask": mask}, adapters=["pydoc", None])

    Threads: as `ArtifactSession` says. One run sees one generation of each adapter, at all sites.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        model: Model,
        providers: list[tuple[str, dict[str, Any]]],
        threads: int | None,
        cuda_graphs: bool = False,
        kernels: Kernels = "auto",
    ) -> None:
        if model.onnx is None:
            raise ArtifactError(
                f"{folder}: the model has no ONNX graph; add onnx to export.formats and build again"
            )
        self.model = model
        self._input_dtypes = {entry.name: NUMPY_DTYPES[entry.dtype] for entry in model.inputs}
        self._shortest = sequence_of(model.outputs, 1)
        if model.packed and cuda_graphs:
            raise ProviderError(
                f"{folder}: its texts are packed (export.packed), so that the number of tokens"
                " depends on the batch, and no CUDA graph can hold that; pass no cuda_graphs, or"
                " build without export.packed"
            )
        if model.packed == "cuda" and devices.session_device(providers[0])[0] == "cpu":
            raise ProviderError(
                f"{folder}: {manifest.needs_cuda}; pass providers=['cuda'], or build with export:"
                " {tune: {device: cpu}}, or without export.packed"
            )
        super().__init__(folder, manifest, providers, cuda_graphs, kernels)
        every = (stack.name for layer in manifest.layers for stack in layer.stacks)
        stacks = {name: self._host.stack(name) for name in every}
        self._session: ort.InferenceSession | None = open_session(
            resolve(folder, model.onnx), self._providers, stacks, threads, self._kernels.library
        )
        headless = [layer.name for layer in manifest.layers if not layer.in_base]
        self._headless = headless[0] if headless else None
        self._buckets = None
        if self._replays is not None:
            first = 0 if self._headless is None else 1
            self._buckets = RowBuckets(
                self._session, model, manifest.num_slots, first, self._device, self._replays
            )

    def run(
        self,
        inputs: Mapping[str, Any],
        adapters: Sequence[RowAdapters] | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """The model's outputs by name, every row with its own adapter.

        Args:
            inputs: the model's own inputs by name, as `model.inputs` lists them: numpy arrays
                (bfloat16 as `ml_dtypes.bfloat16`), or DLPack tensors or `onnxruntime.OrtValue`s on
                the session's device, used without a copy (but copied on the device into a bucket,
                see `warm_up`). Padding as the attention mask says. The length is held to the
                manifest's `positions`, and ids on the host to its tables, as far as it has them
                (`model.facts`); ids on a CUDA device are not.
            adapters: for each row a loaded adapter's name, None for the base, or (export.blend) a
                blend `{"sql": 0.7, "chat": 0.3}`: at every site base + sum of w_i (y_i - base).
                A weight may be negative; 0 selects nothing. Default: all None.
            timeout: seconds to wait for slots, where other runs hold them; None: as long as it
                takes.

        Returns:
            numpy arrays for numpy inputs, else `onnxruntime.OrtValue`s on the device, which a run
            takes as inputs too.

        Raises:
            BatchError: one of UnknownAdapterError, SlotsExceededError, SlotTimeoutError,
                InputError.
            ClosedError: the session is closed.
        """
        with self._gate.entry(), self._gate:
            batch, sequence = self._check_inputs(inputs)
            rows = read_rows(adapters, batch)
            self._check_rows(rows)
            with self._host.slots.lease(row_names(rows), timeout) as slots:
                adapter_ids, weights = row_arrays(rows, slots, self.manifest.num_slots)
                return self._run_graph(inputs, batch, sequence, adapter_ids, weights)

    def warm_up(self, sizes: Iterable[tuple[int, int] | int]) -> None:
        """Take memory and, with `load(…, cuda_graphs=True)`, capture CUDA graphs ahead of runs.

        A run then takes the smallest bucket that holds it: rows are added, and shorter texts are
        filled up on the right, masked. That holds for numpy arrays, and for models that give the
        same for padded texts, which is tried for each bucket; otherwise, and for device tensors,
        a bucket takes texts of just its length. What fits into none is computed as ever. Adapters
        that are loaded later are seen by what is captured. No thread of another library may use the
        device meanwhile: CUDA refuses much of its work during a capture. The thread that calls it
        replays at once; others hand their runs to a thread of the session.

        Args:
            sizes: (rows, tokens per row); of a model of images numbers of rows.

        Raises:
            InputError: a size is not of numbers from 1 on, or longer than the model's positions.
            ProviderError: onnxruntime cannot capture this graph.
            ClosedError: the session is closed.
        """
        with self._gate.entry(), self._gate:
            pairs = read_sizes(self.model, sizes)
            for _, tokens in pairs:
                check_length(tokens, self.model.facts.positions, "warm_up: sizes")
            if self._buckets is not None:
                self._buckets.warm_up(pairs)
                return
            slot = 0 if self._headless is None else 1
            for rows, tokens in pairs:
                adapter_ids = np.full(rows, slot, np.int64)
                inputs = sample_inputs(self.model, rows, tokens)
                self._run_graph(inputs, rows, tokens, adapter_ids, None)

    def _run_graph(
        self,
        inputs: Mapping[str, Any],
        batch: int,
        sequence: int,
        adapter_ids: np.ndarray,
        weights: np.ndarray | None,
    ) -> dict[str, Any]:
        if self._buckets is not None:
            on_host = all(isinstance(tensor, np.ndarray) for tensor in inputs.values())
            sized = self._buckets.find(batch, sequence, on_host)
            if sized is not None:
                size = batch, sequence, on_host
                return self._buckets.run(sized, inputs, *size, adapter_ids, weights)
            _LOG.debug("no bucket holds %d rows of %d, which run as they are", batch, sequence)
        assert self._session is not None, "the gate lets nobody in once it is closed"
        control = {"adapter_ids": adapter_ids}
        if weights is not None:
            control[ADAPTER_WEIGHTS] = weights
        run = run_bound if self._replays is None else self._replays.run_plain
        return run(
            self._session,
            {entry.name: (inputs[entry.name], entry.dtype) for entry in self.model.inputs},
            control,
            {
                output.name: (output.sizes(batch, sequence), output.dtype)
                for output in self.model.outputs
            },
            self._device,
        )

    def _check_rows(self, rows: Sequence[RowAdapters]) -> None:
        """Refuse what this graph cannot give. Raises InputError."""
        if self._headless is None and are_plain(rows):
            return
        for index, row in enumerate(rows):
            if isinstance(row, Mapping) and not self.model.blend:
                raise InputError(
                    f"adapters[{index}] is a blend, which this graph has no input for; add"
                    " export: {blend: true} to the spec and build again"
                )
            largest = -lowest(NUMPY_DTYPES[self.manifest.dtype])
            for name, weight in row.items() if isinstance(row, Mapping) else ():
                if abs(weight) > largest:
                    raise InputError(
                        f"adapters[{index}]: weight {weight!r} of adapter {name!r} is too large for"
                        f" {self.manifest.dtype}"
                    )
            names_one = any(row.values()) if isinstance(row, Mapping) else row is not None
            if self._headless is not None and not names_one:
                raise InputError(
                    f"adapters[{index}] names no adapter, but the base has no {self._headless!r} of"
                    " its own; name one of list_adapters() for every row"
                )

    def _graph_stacks(self) -> Mapping[str, tuple[Stack, ...]]:
        return {"model": tuple(stack for layer in self.manifest.layers for stack in layer.stacks)}

    def _drop_graphs(self) -> None:
        self._session = self._buckets = None

    def _check_inputs(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """(batch, sequence). Raises InputError for other names, shapes or dtypes."""
        if inputs.keys() != self._input_dtypes.keys():
            names = list(self._input_dtypes)
            raise InputError(f"inputs are {sorted(inputs)}; this model takes {names}")
        sizes: dict[str, int] = {}
        last: tuple[Any, Any] = ((), ())
        for entry in self.model.inputs:
            tensor = inputs[entry.name]
            if not hasattr(tensor, "__dlpack__"):
                raise InputError(
                    f"{entry.name} is of type {type(tensor).__name__}; expected a numpy array or a"
                    " DLPack tensor"
                )
            is_array = isinstance(tensor, np.ndarray)
            # The name of a dtype takes longer than a comparison.
            if not is_array or tensor.dtype != self._input_dtypes[entry.name]:
                dtype = dtype_of(tensor)
                if dtype != entry.dtype:
                    raise InputError(f"{entry.name} is {dtype}; this model takes {entry.dtype}")
            shape = tensor.shape if is_array else shape_of(tensor)
            if (entry.shape, shape) == last:  # most models' inputs are alike
                continue
            last = entry.shape, shape
            fits = len(shape) == len(entry.shape)
            for name, size in zip(entry.shape, shape if fits else (), strict=False):
                fits &= size == (sizes.setdefault(name, size) if name.isalpha() else int(name))
            if not fits or 0 in shape:
                expected = ", ".join(str(sizes.get(name, name)) for name in entry.shape)
                raise InputError(
                    f"{entry.name} has shape {list(shape)}; expected [{expected}], none of them 0"
                )
        sequence = sizes.get("sequence", 1)
        check_tokens(inputs, self.model.facts, sequence)
        if "sequence" in sizes and sequence < self._shortest:
            raise InputError(
                f"{self.model.inputs[0].name} has {sequence} samples a row, of which the model's"
                f" convolutions leave nothing; expected {self._shortest} at least"
            )
        return sizes["batch"], sequence
