"""The adapters of an open artifact: which sit in slots, and the device memory they fill.

What a session of layers and a session of a whole model have in common.
"""

from pathlib import Path

import numpy as np

from . import adapters as peft
from .devices import NUMPY_DTYPES, StackBuffer
from .errors import AdapterError, ArtifactError
from .manifest import AdapterEntry, Manifest, resolve
from .slots import Slots
from .stacks import assemble, check_fit, pack
from .weights import read_header, read_tensors


class AdapterHost:
    """Loads PEFT adapters into the slots of every stack. Safe to use from threads."""

    def __init__(self, folder: Path, manifest: Manifest, device: tuple[str, int]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._dtype = NUMPY_DTYPES[manifest.dtype]
        loaded = {entry.name: entry.slot for entry in manifest.adapters if entry.slot is not None}
        self.slots = Slots(manifest.num_slots, loaded)
        values = self._initial_stacks()
        self._stacks = {
            stack.name: StackBuffer(stack, values[stack.name], manifest.dtype, device)
            for layer in manifest.layers
            for stack in layer.stacks
        }

    @property
    def adapters(self) -> dict[str, int]:
        """The loaded adapters, name -> slot."""
        return self.slots.loaded

    def load_adapter(self, name: str, path: str | Path | None = None, *, scale: float = 1.0) -> int:
        """Put an adapter into a free slot, in place; other rows are undisturbed. Returns the slot.

        The name of a loaded adapter replaces it: a run sees the old weights or the new ones.

        Args:
            path: a PEFT directory; default: the adapter of this name that the artifact carries,
                with the scale of its spec.
            scale: multiplies the adapter's scaling.

        Raises:
            AdapterError, WeightsError: the adapter cannot be used here; nothing has changed.
            SlotsExceededError: no slot is free.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"expected a name for the adapter, got {name!r}")
        if path is None:
            carried = {entry.name: entry for entry in self.manifest.adapters}
            if name not in carried:
                raise AdapterError(
                    f"the artifact carries no adapter {name!r} (it has {', '.join(carried)});"
                    " give the path of a PEFT directory"
                )
            blocks = self._read_carried(carried[name], scale)
        else:
            blocks = self._read_blocks(Path(path), scale)

        def write(slot: int) -> None:
            for stack, block in blocks.items():
                self._stacks[stack].write(slot, block)

        return self.slots.fill(name, write)

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's slot; runs that use it finish. Raises UnknownAdapterError."""
        self.slots.remove(name)

    def _read_carried(self, entry: AdapterEntry, scale: float = 1.0) -> dict[str, np.ndarray]:
        path = resolve(self.folder, entry.path)
        if peft.digest_adapter(path) != entry.digest:
            raise ArtifactError(
                f"{path}: its digest differs from the manifest's; the artifact was damaged, or"
                " replaced since this session opened it: open it again"
            )
        return self._read_blocks(path, entry.scale * scale)

    def _read_blocks(self, path: Path, scale: float) -> dict[str, np.ndarray]:
        """One slot's rows of every stack, for a PEFT directory."""
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
        return blocks

    def _initial_stacks(self) -> dict[str, np.ndarray]:
        """Every stack with the adapters that start loaded, as the graphs' own initializers."""
        blocks = {
            entry.slot: self._read_carried(entry)
            for entry in self.manifest.adapters
            if entry.slot is not None
        }
        stacks: dict[str, np.ndarray] = {}
        for layer in self.manifest.layers:
            base_rows: dict[str, np.ndarray] = {}
            if layer.base_rows is not None:
                header = read_header(resolve(self.folder, layer.base_rows))
                base_rows = read_tensors(header.items())
            for stack in layer.stacks:
                stacks[stack.name] = assemble(stack, self._dtype, base_rows.get(stack.name), blocks)
        return stacks
