"""The adapters of an open artifact: their host memory, and the device memory of the slots.

Takes the folder, its manifest and a device; a session of any kind owns one.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..adapters.dora import (
    dora_sites,
    find_base_weights,
    output_scales,
    read_scales,
    require_scales,
)
from ..adapters.files import digest_adapter
from ..adapters.fit import check_carried, check_fit
from ..adapters.graph_tensors import GraphTensors
from ..adapters.header import read_adapter
from ..adapters.listed_tensors import ListedTensors
from ..adapters.packing import assemble, pack
from ..adapters.sites import check_base_copies, match_sites, seen_naming
from ..adapters.tensors import AdapterContent, ModuleWeights, read_site_weights
from ..contract import format4
from ..contract.files import resolve
from ..contract.kinds import Decoder
from ..contract.listed import ListedFiles
from ..contract.manifest import PARAMETERS, AdapterEntry, Manifest, Stack
from ..contract.naming import Naming
from ..device.captures import using
from ..device.dtypes import NUMPY_DTYPES
from ..errors import AdapterError, ArtifactError, LoraexportError, quoted
from .buffers import StackBuffer
from .onnx_adapter import write_onnx_adapters
from .pool import Blocks, Slots
from .table import HostAdapter
from .weakly import weakly

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
    ) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self._files = ListedFiles(folder, manifest.files)
        self._dtype = NUMPY_DTYPES[manifest.dtype]
        with ListedTensors(self._files) as tensors:
            self._base_rows = self._read_base_rows(tensors)
        self._naming = self._read_naming()
        stacks = [stack for layer in manifest.layers for stack in layer.stacks]
        # Artifacts of before such slots had room for any adapter; nothing is written into them.
        self._is_fixed = any(stack.slot_rows is not None for stack in stacks)
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
            manifest.num_slots,
            loaded,
            adapters,
            weakly(self._read_by_name),
            weakly(self._write_slot),
        )
        # One after the other: those of a decoder hold most of the base.
        self._stacks = {
            stack.name: StackBuffer(stack, values, stack.dtype(manifest.dtype), device)
            for stack, values in self._whole_stacks(dict(self.slots.snapshot().values()))
        }

    def stack(self, name: str) -> ort.OrtValue:
        """A stack's memory on the device, which graphs read in place of their initializer."""
        return self._stacks[name].value

    def load(
        self, name: str, path: Path | None, scale: float, base: Path | None, timeout: float | None
    ) -> int:
        """Put an adapter into a slot; see `ArtifactSession.load_adapter`."""
        if not isinstance(name, str) or not name:
            raise AdapterError(f"expected a name for the adapter, got {name!r}")
        if not isinstance(scale, int | float | np.number):
            raise AdapterError(f"scale is {quoted(scale)}; expected a finite number")
        if self._is_fixed:
            raise AdapterError(
                f"{self.folder}: its slots have room for the adapters that they were built with and"
                " for no other; build it again to load more"
            )
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
        snapshot = self.slots.snapshot()
        contents = dict(snapshot.values())
        stacks = {stack.name: values for stack, values in self._whole_stacks(contents)}
        graphs = {
            graph: {stack.name: stacks[stack.name] for stack in parts}
            for graph, parts in graph_stacks.items()
        }
        slots = {name: slot for name, (slot, _) in snapshot.items()}
        write_onnx_adapters(folder, graphs, slots)
        return slots

    def _write_slot(self, slot: int, blocks: Blocks) -> None:
        with using(self.device):
            for stack, block in blocks.items():
                self._stacks[stack].write(slot, block)

    def _carried(self, name: str) -> AdapterEntry:
        carried = {entry.name: entry for entry in self.manifest.adapters}
        if name not in carried:
            raise AdapterError(
                f"the artifact carries no adapter {name!r} among its {len(carried)}; give the path"
                " of a PEFT directory"
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
        ready = read_scales(self._files, entry.path) if scale == 1 else {}
        blocks: Blocks = {}
        try:
            if self._is_fixed:  # the graph has its rows, which stay
                ranks = {site: part.rank for site, part in entry.sites.items()}
                digest = digest_adapter(path)
            else:
                read = self._read_rows(path, entry.scale * scale, base, ready, entry)
                ranks, blocks, digest = read
        except LoraexportError:
            if (digest := digest_adapter(path)) == entry.digest:
                raise  # it is what was listed, and cannot be used
        if digest != entry.digest:
            raise ArtifactError(
                f"{path}: its digest differs from the manifest's; the artifact was damaged, or"
                " replaced since this session opened it: open it again"
            )
        return HostAdapter(ranks, blocks, digest, entry.scale * scale, None)

    def _read_adapter(self, path: Path, scale: float, base: Path | None) -> HostAdapter:
        ranks, blocks, digest = self._read_rows(path, scale, base)
        return HostAdapter(ranks, blocks, digest, scale, path)

    def _read_rows(
        self,
        path: Path,
        scale: float,
        base: Path | None,
        output_scales: Mapping[str, np.ndarray] | None = None,
        entry: AdapterEntry | None = None,
    ) -> tuple[dict[str, int], Blocks, str]:
        """A PEFT directory -> its ranks by site, one slot's rows of every stack, and its digest.

        The files are read once, and the digest is of what was read.
        """
        header = read_adapter(path, at_rest=True)
        layers = self.manifest.layers
        sites = {part.site for layer in layers for part in layer.slices}
        matched = match_sites(header, sites, self._naming)
        check_fit(header, matched, layers)
        content = AdapterContent(header)
        weights_of_base = self.manifest.base.weights
        check_base_copies(header, matched, weights_of_base, self._naming, content)
        if entry is not None:
            check_carried(entry, header, matched)
        weights = read_site_weights(header, matched, content)
        if output_scales:
            require_scales(output_scales, dora_sites(weights), path)
        scales = output_scales or self._output_scales(path, weights, scale, base)
        blocks: dict[str, np.ndarray] = {}
        for layer in layers:
            blocks |= pack(layer, weights, scale, self._dtype, self._base_rows, scales)
        modules = {site: header.modules.get(module) for site, module in sorted(matched.items())}
        ranks = {site: module.rank for site, module in modules.items() if module is not None}
        return ranks, blocks, content.digest

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
        weights_of_base = find_base_weights(base, digests)
        return output_scales(dora, weights_of_base.__getitem__, self.manifest.layers, scale)

    def _read_naming(self) -> Naming:
        """The manifest's; of one of format 4, which says none, what its own adapters have."""
        if self.manifest.format_version != format4.FORMAT:
            return self.manifest.base.naming
        return seen_naming(
            (read_adapter(resolve(self.folder, entry.path)), {*entry.sites, *entry.heads})
            for entry in self.manifest.adapters
        )

    def _read_base_rows(self, tensors: ListedTensors) -> dict[str, np.ndarray]:
        """The base's rows of the stacks that replace its parameters; W^T stays in its file."""
        with GraphTensors(self._files) as graph:
            return {
                stack.name: self._read_graph(graph, stack, stack.row_offset)
                if layer.base_rows is None
                else _read_rows_of(tensors, layer.base_rows, stack)
                for layer in self.manifest.layers
                for stack in layer.stacks
                if stack.role in PARAMETERS
            }

    def _whole_stacks(self, blocks: Mapping[int, Blocks]) -> Iterator[tuple[Stack, np.ndarray]]:
        """Every stack with some slots filled and the others as the graphs' initializers."""
        with ListedTensors(self._files) as tensors, GraphTensors(self._files) as graph:
            for layer in self.manifest.layers:
                for stack in layer.stacks:
                    if self._is_fixed:
                        yield stack, self._read_graph(graph, stack, stack.shape[0])
                        continue
                    rows = self._base_rows.get(stack.name)
                    if rows is None and stack.row_offset and layer.base_rows is not None:
                        rows = _read_rows_of(tensors, layer.base_rows, stack)
                    elif rows is None and stack.row_offset:
                        rows = self._read_graph(graph, stack, stack.row_offset)
                    dtype = NUMPY_DTYPES[stack.dtype(self.manifest.dtype)]
                    yield stack, assemble(stack, dtype, rows, blocks)

    def _read_graph(self, graph: GraphTensors, stack: Stack, rows: int) -> np.ndarray:
        """The first rows of a stack of a decoder, whose base is in its graph alone."""
        assert isinstance(self.manifest.kind, Decoder), "other kinds have a file of the base's rows"
        shape = (rows, stack.shape[1])
        return graph.read(self.manifest.kind.onnx, stack.name, shape, self._dtype)


def _read_rows_of(tensors: ListedTensors, file: str, stack: Stack) -> np.ndarray:
    """The base's rows of a stack, from a file in the artifact."""
    return tensors.read(file, stack.name, (stack.row_offset, stack.shape[1]))
