"""ONNX graphs over bound device buffers, plain or as CUDA graphs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort
from torch import Tensor

from loraexport_runtime.device.kernels import kernel_library, why_no_library
from loraexport_runtime.device.memory import device_value
from loraexport_runtime.device.ort_session import open_session

from ..device import Device
from ..work import CannotRun

NOT_CAPTURED = -1
"""onnxruntime's own number for a run that is not to be captured, in a session that captures."""


def require_kernels(device: Device, dtype: str) -> Path:
    """The library of loraexport-kernels. Raises CannotRun: there is none for this device."""
    why = why_no_library(dtype, device.place)
    if why is not None:
        raise CannotRun(why)
    return kernel_library()


class BoundGraph:
    """A session of one graph. `bind` gives calls that take no argument and copy nothing.

    Captured: every call that `bind` gives is a CUDA graph of its own, over its own inputs and
    outputs; so inputs rotate without a copy into one fixed buffer.
    """

    def __init__(
        self, path: Path, device: Device, captured: bool = False, library: Path | None = None
    ) -> None:
        """
        Args:
            library: of kernels, for a graph that calls functions.
        """
        if captured and device.kind != "cuda":
            raise CannotRun("CUDA graphs need a CUDA device")
        self.captured = captured
        self._device = device
        providers = device.providers(captured)
        self._session = open_session(path, providers, {}, device.threads, library)
        self._num_graphs = 0
        self.inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self.outputs = {entry.name: entry for entry in self._session.get_outputs()}

    def bind(
        self,
        feeds: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        graph_id: int | None = None,
    ) -> Callable[[], object]:
        """A call over these tensors, which are on the device.

        Args:
            graph_id: default: the next one, or none where nothing is captured.
        """
        binding = self._session.io_binding()
        for name, tensor in feeds.items():
            binding.bind_ortvalue_input(name, device_value(tensor, self._device.place, name))
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, device_value(tensor, self._device.place, name))
        options = ort.RunOptions()
        if self._device.kind == "cuda":
            # All is on one stream, so that no call has to wait for its end.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.captured:
            if graph_id is None:
                self._num_graphs += 1
                graph_id = self._num_graphs
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        session, alive = self._session, (dict(feeds), dict(outputs))

        def call() -> object:
            session.run_with_iobinding(binding, options)
            return alive

        return call
