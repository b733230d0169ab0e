"""The device of a run: its stream and its caches."""

import ctypes
import gc
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loraexport_runtime.device.ort_session import require_device
from loraexport_runtime.device.providers import CPU, CUDA, normalise_providers
from loraexport_runtime.errors import ProviderError

from ..parity.report import environment as versions

MAX_COPIES = 8
_TOOLS = ("peft", "transformers", "onnxruntime-genai-cuda", "onnxruntime-genai", "loraexport")


class Device:
    """Where all contestants run; on CUDA all but GenAI's on one stream, which events measure."""

    def __init__(self, kind: str, threads: int | None) -> None:
        """
        Args:
            threads: of the host, for torch and for each onnxruntime session.

        Raises:
            ProviderError: CUDA was asked for, and torch or onnxruntime cannot use it here.
        """
        self.kind, self.threads = kind, threads
        self.place = (kind, 0)
        self.torch = torch.device(kind)
        self._stream: Any = None
        self._l2_bytes, self.name = 0, _cpu_name()
        if kind == "cuda":
            normalise_providers([CUDA])
            require_device(self.place)
            if not torch.cuda.is_available():
                raise ProviderError(
                    f"the workloads ask for CUDA, but torch {torch.__version__} has no CUDA device"
                    " here; install torch for CUDA, or set device: cpu"
                )
            # A stream of its own: the default one cannot be captured.
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            properties = torch.cuda.get_device_properties(0)
            self._l2_bytes, self.name = int(properties.L2_cache_size), properties.name

    @contextmanager
    def active(self) -> Iterator[None]:
        """Everything that torch does here goes to the device's stream, without gradients."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            # torch.cuda.stream(None) changes nothing.
            with torch.no_grad(), torch.cuda.stream(self._stream):
                yield
        finally:
            torch.set_num_threads(before)

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def recover(self) -> None:
        """After a failed contestant: end its capture, or the stream refuses all that follows."""
        if self._stream is None:
            return
        graph, stream = ctypes.c_void_p(), ctypes.c_void_p(self._stream.cuda_stream)
        # An error code, which may be ignored, if there is no capture.
        ctypes.CDLL("libcuda.so.1").cuStreamEndCapture(stream, ctypes.byref(graph))
        with suppress(RuntimeError):  # what failed is told already
            torch.cuda.synchronize()

    @property
    def takes_kernels(self) -> bool:
        """Whether the runtime takes kernels here of its own accord."""
        return self.kind == "cuda"

    def forget_compiled(self) -> None:
        """Let go of what torch.compile made for a cell: shapes of the next one are others, and it
        keeps eight of a module."""
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and this would import it
            torch.compiler.reset()

    def free(self) -> None:
        """Give back what torch keeps of a workload that is over."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def event(self) -> Any:
        """A moment on the device's stream, or None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def providers(self, captured: bool) -> list[tuple[str, dict[str, Any]]]:
        """onnxruntime's provider, on the same stream."""
        if self.kind == "cpu":
            return normalise_providers([CPU])
        options = {"user_compute_stream": str(self._stream.cuda_stream)}
        if captured:
            options["enable_cuda_graph"] = "1"
        return normalise_providers([(CUDA, options)])

    def num_copies(self, nbytes: int) -> int:
        """Copies of an input of `nbytes` that together exceed the L2 twice: 2 to MAX_COPIES.

        No more than that, as the weights that a call reads push the inputs out of the L2 too.
        """
        return min(MAX_COPIES, max(2, math.ceil(2 * self._l2_bytes / max(nbytes, 1))))

    def environment(self) -> dict[str, str]:
        """What the figures depend on."""
        environment = {"date": datetime.now(UTC).date().isoformat(), "device": self.name}
        if self.kind == "cuda":
            environment["driver"] = _driver()
            environment["cuda of torch"] = str(torch.version.cuda)
            environment["L2, MiB"] = str(self._l2_bytes >> 20)
        threads = f", {self.threads} used by each contestant" if self.threads else ""
        environment["host"] = f"{_cpu_name()}, {os.cpu_count()} cores{threads}"
        for tool in _TOOLS:
            try:
                environment[tool] = version(tool)
            except PackageNotFoundError:
                continue
        return environment | {key: value for key, value in versions().items() if key != "gpu"}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()
