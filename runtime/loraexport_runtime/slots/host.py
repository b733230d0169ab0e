"""The adapters of an open artifact: their host memory, and the device memory of the slots.

Takes the folder, its manifest and a device; a session of any kind owns one.
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..adapters import header as peft
from ..adapters.dora import SCALES_FILE, dora_sites, find_base_weights, output_scales
from ..adapters.fit import check_fit
from ..adapters.packing import assemble, pack
from ..adapters.sites import check_base_copies, match_sites
from ..adapters.tensor_files import read_header, read_tensors
from ..adapters.tensors import ModuleWeights, read_site_weights
from ..contract.files import resolve
from ..contract.manifest import AdapterEntry, Manifest, Stack
from ..device.dtypes import NUMPY_DTYPES
from ..errors import AdapterError, ArtifactError
from .buffers import StackBuffer
from .onnx_adapter import write_onnx_adapters
from .pool import Blocks, Slots
from .table import HostAdapter

_LOG = logging.getLogger(__name__)


class AdapterHost:
    """Loads PEFT adapters into the slots of every stack. Safe to use from threads.

    Each adapter stays in host memory, as the rows of its slot in the graph's dtype, whether it
    sits in a slot or not; one that the artifact carries without a slot is read by the first run
    that names it. So paging copies ready blocks, and never reads from the device.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: tuple[str, int],
        guard: AbstractContextManager[Any],
    ) -> None:
        """`guard`: held while a slot is written, as often as that happens."""
        self.folder = folder
        self.manifest = manifest
        self._guard = guard
        self._dtype = NUMPY_DTYPES[manifest.dtype]
        self._base_rows = self._read_base_rows()
        loaded = {entry.name: entry.slot for entry in manifest.adapters if entry.slot is not None}
        adapters = {
            entry.name: self._read_carried(entry)
            if entry.slot is not None
            else HostAdapter(
                ranks={site: part.rank for site, part in entry.sites.items()},
                blocks=None,
                digest=entry.digest,
                scale=entry.scale,
                path=None,
            )
            for entry in manifest.adapters
        }
        self.slots = Slots(
            manifest.num_slots, loaded, adapters, self._read_by_name, self._write_slot
        )
        values = self._whole_stacks(dict(self.slots.snapshot().values()))
        self._stacks = {
            stack.name: StackBuffer(stack, values[stack.name], manifest.dtype, device)
            for layer in manifest.layers
            for stack in layer.stacks
        }

    def stack(self, name: str) -> ort.OrtValue:
        """A stack's memory on the device, which graphs read in place of their initializer."""
        return self._stacks[name].value

    def load(
        self,
        name: str,
        path: Path | None,
        scale: float,
        base: Path | None,
        timeout: float | None,
    ) -> int:
        """Put an adapter into a slot; see `ArtifactSession.load_adapter`."""
        if not isinstance(name, str) or not name:
            raise AdapterError(f"expected a name for the adapter, got {name!r}")
        if path is not None:
            adapter = self._read_adapter(path, scale, base)
        else:
            adapter = self._read_carried(self._carried(name), scale, base)
        slot = self.slots.fill(name, adapter, timeout)
        if _LOG.isEnabledFor(logging.INFO):
            size = sum(block.nbytes for block in (adapter.blocks or {}).values())
            _LOG.info(
                "adapter %r loaded into slot %d from %s: %d bytes, sha256 %s",
                name,
                slot,
                path or "the artifact",
                size,
                adapter.digest,
            )
        return slot

    def close(self) -> None:
        """Drop the memory of all adapters, on the device too; nobody may run any more."""
        self.slots.clear()
        self._stacks.clear()
        self._base_rows.clear()

    def export(self, folder: Path, graph_stacks: Mapping[str, tuple[Stack, ...]]) -> dict[str, int]:
        """Write the slots for onnxruntime's own LoraAdapter API. Returns adapter name -> slot.

        Args:
            graph_stacks: the stacks that each ONNX graph takes, by the name of its file.
        """
        held = self.slots.snapshot()
        stacks = self._whole_stacks(dict(held.values()))
        graphs = {
            graph: {stack.name: stacks[stack.name] for stack in parts}
            for graph, parts in graph_stacks.items()
        }
        slots = {name: slot for name, (slot, _) in held.items()}
        write_onnx_adapters(folder, graphs, self.manifest.dtype, slots)
        return slots

    def _write_slot(self, slot: int, blocks: Blocks) -> None:
        with self._guard:
            for stack, block in blocks.items():
                self._stacks[stack].write(slot, block)

    def _carried(self, name: str) -> AdapterEntry:
        carried = {entry.name: entry for entry in self.manifest.adapters}
        if name not in carried:
            raise AdapterError(
                f"the artifact carries no adapter {name!r} (it has {', '.join(carried)});"
                " give the path of a PEFT directory"
            )
        return carried[name]

    def _read_by_name(self, name: str) -> Blocks:
        blocks = self._read_carried(self._carried(name)).blocks
        assert blocks is not None, "what has just been read"
        return blocks

    def _read_carried(
        self, entry: AdapterEntry, scale: float = 1.0, base: Path | None = None
    ) -> HostAdapter:
        path = resolve(self.folder, entry.path)
        digest = peft.digest_adapter(path)
        if digest != entry.digest:
            raise ArtifactError(
                f"{path}: its digest differs from the manifest's; the artifact was damaged, or"
                " replaced since this session opened it: open it again"
            )
        scales = resolve(self.folder, f"{entry.path}/{SCALES_FILE}")
        ready = read_tensors(read_header(scales).items()) if scales.is_file() and scale == 1 else {}
        ranks, blocks = self._read_rows(path, entry.scale * scale, base, ready)
        return HostAdapter(ranks, blocks, digest, entry.scale * scale, None)

    def _read_adapter(self, path: Path, scale: float, base: Path | None) -> HostAdapter:
        ranks, blocks = self._read_rows(path, scale, base)
        return HostAdapter(ranks, blocks, peft.digest_adapter(path), scale, path)

    def _read_rows(
        self,
        path: Path,
        scale: float,
        base: Path | None,
        output_scales: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[dict[str, int], Blocks]:
        """A PEFT directory -> its ranks by site, and one slot's rows of every stack."""
        header = peft.read_adapter(path)
        layers = self.manifest.layers
        matched = match_sites(header, [part.site for one in layers for part in one.slices])
        check_fit(header, matched, layers)
        check_base_copies(header, matched, self.manifest.base.weights)
        weights = read_site_weights(header, matched)
        scales = output_scales or self._output_scales(path, weights, scale, base)
        blocks: dict[str, np.ndarray] = {}
        for layer in layers:
            blocks |= pack(layer, weights, scale, self._dtype, self._base_rows, scales)
        modules = {site: header.modules.get(module) for site, module in sorted(matched.items())}
        ranks = {site: module.rank for site, module in modules.items() if module is not None}
        return ranks, blocks

    def _output_scales(
        self, path: Path, weights: Mapping[str, ModuleWeights], scale: float, base: Path | None
    ) -> dict[str, np.ndarray]:
        """DoRA's g by site, for an adapter that comes without them."""
        dora = dora_sites(weights)
        if not dora:
            return {}
        if base is None:
            raise AdapterError(
                f"{path}: uses DoRA, which scales outputs by m / ||W + s B A||, and the artifact"
                " does not keep W apart: pass base=, the directory of the model it was built from"
            )
        digests = {site: self.manifest.base.weights[site] for site in dora}
        return output_scales(dora, find_base_weights(base, digests), self.manifest.layers, scale)

    def _read_base_rows(self) -> dict[str, np.ndarray]:
        """The base's rows of the stacks that replace its parameters; W^T stays in its file."""
        roles = ("output_scale", "bias", "weight")
        wanted = {
            stack.name: layer.base_rows
            for layer in self.manifest.layers
            for stack in layer.stacks
            if stack.role in roles and layer.base_rows is not None
        }
        return self._rows_of(wanted)

    def _rows_of(self, files: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Rows by stack name; `files`: stack name -> file in the artifact."""
        headers = {file: read_header(resolve(self.folder, file)) for file in set(files.values())}
        return read_tensors((stack, headers[file][stack]) for stack, file in files.items())

    def _whole_stacks(self, blocks: Mapping[int, Blocks]) -> dict[str, np.ndarray]:
        """Every stack with some slots filled and the others as the graphs' initializers."""
        stacks: dict[str, np.ndarray] = {}
        for layer in self.manifest.layers:
            for stack in layer.stacks:
                rows = self._base_rows.get(stack.name)
                if rows is None and stack.row_offset and layer.base_rows is not None:
                    rows = self._rows_of({stack.name: layer.base_rows})[stack.name]
                stacks[stack.name] = assemble(stack, self._dtype, rows, blocks)
        return stacks
