"""What every open session has, whatever its artifact's kind: adapters, statistics, and an end."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ..buckets.replays import Replays, check_capturable
from ..contract.manifest import Manifest, Stack
from ..device import providers as devices
from ..device.captures import using
from ..device.kernels import Kernels, choose_kernels
from ..device.ort_session import require_device
from ..slots.gate import Gate
from ..slots.host import AdapterHost
from ..slots.hosted import HostsAdapters
from .stats import SessionStats

_LOG = logging.getLogger(__name__)


class ArtifactSession(HostsAdapters, ABC):
    """An open artifact and the adapters in its slots; `LayersSession` and `ModelSession` run it.

    Threads: every method may be called from any thread, at the same time as any other, but for
    `warm_up`. A run takes the slots of all adapters that it names when it begins and keeps them
    until it ends: so it sees the weights of before a load, an unload or a replacement that happens
    meanwhile, or, if it began later, those of after it, and never a mixture. A load waits for the
    runs that use the slot that it writes. `close` waits for the calls that have begun, and those
    that come later raise ClosedError. With CUDA graphs one run computes at a time, and while
    `warm_up` captures no thread of another library may use the device.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        providers: list[tuple[str, dict[str, Any]]],
        cuda_graphs: bool,
        kernels: Kernels,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._device = devices.session_device(providers[0])
        for provider in providers:
            require_device(devices.session_device(provider))
        self._kernels = choose_kernels(kernels, manifest, providers)
        self._replays = Replays(self._device) if cuda_graphs else None
        if self._replays is not None:
            check_capturable(manifest)
        with using(self._device):
            self._host = AdapterHost(folder, manifest, self._device)
        self._gate = Gate(f"the session of {folder}", "open the artifact again")
        self._providers = providers
        if self._replays is not None and self._replays.capture:
            self._providers = devices.with_cuda_graphs(providers)
        elif manifest.dtype != "float32":  # for which cuDNN has no attention
            self._providers = devices.with_varied_shapes(providers)

    def export_adapters(self, folder: str | Path) -> dict[str, int]:
        """Write the slots for onnxruntime's own LoraAdapter API. Returns adapter name -> slot.

        One `<graph>.onnx_adapter` for each graph, because a graph refuses parameters that are not
        its own, and `slots.json` with what is returned: see `write_onnx_adapters`. Slots without
        an adapter are written as zeros.
        """
        with self._gate.entry(), self._gate:
            return self._host.export(Path(folder), self._graph_stacks())

    def stats(self) -> SessionStats:
        """What the session has done so far; also once it is closed.

        Raises ClosedError: this is the child of a fork.
        """
        self._gate.check_process()
        counts, replays = self._host.slots.counts(), self._replays
        return SessionStats(
            slots_held=counts.slots_held,
            hits=counts.hits,
            pages=counts.pages,
            evictions=counts.evictions,
            waits=counts.waits,
            wait_seconds=counts.wait_seconds,
            runs=counts.runs,
            run_seconds=counts.run_seconds,
            bucket_hits=0 if replays is None else replays.num_hits,
            bucket_misses=0 if replays is None else replays.num_misses,
            kernels=self._kernels.said,
        )

    def close(self) -> None:
        """End the session: wait for the calls that have begun, then give its memory and threads up.

        Every later call raises ClosedError, but for `stats` and this one, which does nothing then,
        or ends what an interrupt left. `with load(…) as session:` closes it too.
        """
        self._gate.close(self._give_up)

    def _give_up(self) -> None:
        with using(self._device):
            self._drop_graphs()
            self._host.close()
            if self._replays is not None:
                self._replays.close()
        _LOG.info("closed %s", self.folder)

    def __enter__(self) -> Self:
        self._gate.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _graph_stacks(self) -> Mapping[str, tuple[Stack, ...]]:
        """The stacks that each ONNX graph of the artifact takes, by the name of its file."""

    @abstractmethod
    def _drop_graphs(self) -> None:
        """Let go of onnxruntime's sessions, and of the buckets over them."""
