"""The adapters of an open artifact: their host memory, and the device memory of the slots.

What a session of layers and a session of a whole model have in common.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import adapters as peft
from .devices import NUMPY_DTYPES, StackBuffer
from .errors import AdapterError, ArtifactError
from .manifest import AdapterEntry, Manifest, Stack, resolve
from .onnx_adapter import write_onnx_adapters
from .slot_table import HostAdapter
from .slots import AdapterInfo, Blocks, Slots
from .stacks import assemble, check_fit, pack
from .weights import read_header, read_tensors


class AdapterHost:
    """Loads PEFT adapters into the slots of every stack. Safe to use from threads.

    Each adapter stays in host memory, as the rows of its slot in the graph's dtype, whether it
    sits in a slot or not; one that the artifact carries without a slot is read by the first run
    that names it. So paging copies ready blocks, and never reads from the device.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: tuple[str, int]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._dtype = NUMPY_DTYPES[manifest.dtype]
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

    def load_adapter(self, name: str, path: str | Path | None = None, *, scale: float = 1.0) -> int:
        """Put an adapter into a slot, in place; other rows are undisturbed. Returns the slot.

        The name of a loaded adapter replaces it: a run sees the old weights or the new ones. With
        no slot free, the least recently used adapter without a pin is paged out to host memory.
        The load takes its slot at once, not on first use, so that the first run finds it there.

        Args:
            path: a PEFT directory; default: the adapter of this name that the artifact carries,
                with the scale of its spec.
            scale: multiplies the adapter's scaling.

        Raises:
            AdapterError, WeightsError: the adapter cannot be used here; nothing has changed.
            SlotsExceededError: every slot is kept for a pinned adapter; nothing has changed.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"expected a name for the adapter, got {name!r}")
        if path is not None:
            return self.slots.fill(name, self._read_adapter(Path(path), scale))
        return self.slots.fill(name, self._read_carried(self._carried(name), scale))

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

    def _read_carried(self, entry: AdapterEntry, scale: float = 1.0) -> HostAdapter:
        path = resolve(self.folder, entry.path)
        if peft.digest_adapter(path) != entry.digest:
            raise ArtifactError(
                f"{path}: its digest differs from the manifest's; the artifact was damaged, or"
                " replaced since this session opened it: open it again"
            )
        return self._read_adapter(path, entry.scale * scale)

    def _read_adapter(self, path: Path, scale: float) -> HostAdapter:
        """A PEFT directory -> one slot's rows of every stack."""
        header = peft.read_adapter(path)
        layers = self.manifest.layers
        matched = peft.match_sites(header, [part.site for one in layers for part in one.slices])
        check_fit(header, matched, layers)
        peft.check_base_copies(header, matched, self.manifest.base.weights)
        tensors = peft.read_lora_weights(header)
        weights = {site: tensors[module] for site, module in matched.items()}
        blocks: dict[str, np.ndarray] = {}
        for layer in layers:
            blocks |= pack(layer, weights, scale, self._dtype)
        ranks = {site: header.modules[module].rank for site, module in sorted(matched.items())}
        return HostAdapter(ranks, blocks)

    def _whole_stacks(self, blocks: Mapping[int, Blocks]) -> dict[str, np.ndarray]:
        """Every stack with some slots filled and the others zero, as the graphs' initializers."""
        stacks: dict[str, np.ndarray] = {}
        for layer in self.manifest.layers:
            base_rows: dict[str, np.ndarray] = {}
            if layer.base_rows is not None:
                header = read_header(resolve(self.folder, layer.base_rows))
                base_rows = read_tensors(header.items())
            for stack in layer.stacks:
                stacks[stack.name] = assemble(stack, self._dtype, base_rows.get(stack.name), blocks)
        return stacks
