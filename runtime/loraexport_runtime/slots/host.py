"""The adapters of an open artifact: their host memory, and the device memory of the slots.

What a session of layers and a session of a whole model have in common.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from ..adapters import header as peft
from ..adapters.dora import SCALES_FILE, dora_sites, find_base_weights, output_scales
from ..adapters.fit import check_fit
from ..adapters.packing import assemble, pack
from ..adapters.sites import check_base_copies, match_sites
from ..adapters.tensor_files import read_header, read_tensors
from ..adapters.tensors import ModuleWeights, read_site_weights
from ..buckets.replays import Replays, check_capturable
from ..contract.files import resolve
from ..contract.manifest import AdapterEntry, Manifest, Stack
from ..device.dtypes import NUMPY_DTYPES
from ..errors import AdapterError, ArtifactError
from .buffers import StackBuffer
from .onnx_adapter import write_onnx_adapters
from .pool import AdapterInfo, Blocks, Slots
from .table import HostAdapter


class AdapterHost:
    """Loads PEFT adapters into the slots of every stack. Safe to use from threads.

    Each adapter stays in host memory, as the rows of its slot in the graph's dtype, whether it
    sits in a slot or not; one that the artifact carries without a slot is read by the first run
    that names it. So paging copies ready blocks, and never reads from the device.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: tuple[str, int], cuda_graphs: bool = False
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._replays = Replays(capture=device[0] == "cuda") if cuda_graphs else None
        if self._replays is not None:
            check_capturable(manifest)
        self._dtype = NUMPY_DTYPES[manifest.dtype]
        self._base_rows = self._read_base_rows()
        loaded = {entry.name: entry.slot for entry in manifest.adapters if entry.slot is not None}
        adapters = {
            entry.name: self._read_carried(entry)
            if entry.slot is not None
            else HostAdapter({site: one.rank for site, one in entry.sites.items()}, None)
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

    @property
    def adapters(self) -> dict[str, int]:
        """The adapters that sit in slots now, name -> slot. Runs may name more: `list_adapters`."""
        return self.slots.loaded

    def list_adapters(self) -> dict[str, AdapterInfo]:
        """Every adapter that a run may name: its slot if it is in one, pinned or not, its ranks."""
        return self.slots.listing()

    def load_adapter(
        self,
        name: str,
        path: str | Path | None = None,
        *,
        scale: float = 1.0,
        base: str | Path | None = None,
    ) -> int:
        """Put an adapter into a slot, in place; other rows are undisturbed. Returns the slot.

        The name of a loaded adapter replaces it: a run sees the old weights or the new ones. With
        no slot free, the least recently used adapter without a pin is paged out to host memory.
        The load takes its slot at once, not on first use, so that the first run finds it there.

        Args:
            path: a PEFT directory; default: the adapter of this name that the artifact carries,
                with the scale of its spec.
            scale: multiplies the adapter's scaling.
            base: the base's directory, which an adapter with DoRA needs: its outputs are scaled by
                m / ||W + s B A||. W is found there by its digest.

        Raises:
            AdapterError, WeightsError: the adapter cannot be used here; nothing has changed.
            SlotsExceededError: every slot is kept for a pinned adapter; nothing has changed.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"expected a name for the adapter, got {name!r}")
        folder = None if base is None else Path(base)
        if path is not None:
            return self.slots.fill(name, self._read_adapter(Path(path), scale, folder))
        return self.slots.fill(name, self._read_carried(self._carried(name), scale, folder))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, in host memory too; runs that use it finish, and a pin ends.

        Raises UnknownAdapterError.
        """
        self.slots.remove(name)

    def pin(self, name: str) -> int:
        """Bring an adapter into a slot, and keep it there until `unpin`. Returns the slot.

        Raises:
            UnknownAdapterError: it is not loaded.
            SlotsExceededError: every slot is kept for another pinned adapter.
        """
        return self.slots.pin(name)

    def unpin(self, name: str) -> None:
        """Allow it to be paged out again. Raises UnknownAdapterError: it is not loaded."""
        self.slots.unpin(name)

    def export_adapters(self, folder: str | Path) -> dict[str, int]:
        """Write the slots for onnxruntime's own LoraAdapter API. Returns adapter name -> slot.

        One `<graph>.onnx_adapter` for each graph, because a graph refuses parameters that are not
        its own, and `slots.json` with what is returned: see `write_onnx_adapters`. Slots without
        an adapter are written as zeros.
        """
        held = self.slots.snapshot()
        stacks = self._whole_stacks(dict(held.values()))
        graphs = {
            graph: {stack.name: stacks[stack.name] for stack in parts}
            for graph, parts in self._graph_stacks().items()
        }
        slots = {name: slot for name, (slot, _) in held.items()}
        write_onnx_adapters(Path(folder), graphs, self.manifest.dtype, slots)
        return slots

    def _graph_stacks(self) -> Mapping[str, tuple[Stack, ...]]:
        """The stacks that each ONNX graph of the artifact takes, by the name of its file."""
        return {Path(one.onnx).stem: one.stacks for one in self.manifest.layers if one.onnx}

    def _write_slot(self, slot: int, blocks: Blocks) -> None:
        # Not while a graph is captured: CUDA refuses the copy, and gives the capture up.
        with nullcontext() if self._replays is None else self._replays.lock:
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
        if peft.digest_adapter(path) != entry.digest:
            raise ArtifactError(
                f"{path}: its digest differs from the manifest's; the artifact was damaged, or"
                " replaced since this session opened it: open it again"
            )
        scales = resolve(self.folder, f"{entry.path}/{SCALES_FILE}")
        known = read_tensors(read_header(scales).items()) if scales.is_file() and scale == 1 else {}
        return self._read_adapter(path, entry.scale * scale, base, known)

    def _read_adapter(
        self,
        path: Path,
        scale: float,
        base: Path | None,
        output_scales: Mapping[str, np.ndarray] | None = None,
    ) -> HostAdapter:
        """A PEFT directory -> one slot's rows of every stack."""
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
        return HostAdapter(ranks, blocks)

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
