"""A stack in the device's memory, written slot by slot."""

import numpy as np
import onnxruntime as ort

from ..contract.manifest import Stack
from ..device.dlpack import rows_view
from ..device.dtypes import ONNX_TYPES
from ..device.memory import host_value


class StackBuffer:
    """A stack's memory on the session's device. Slots are written in place, without a copy."""

    def __init__(self, stack: Stack, initial: np.ndarray, dtype: str, device: tuple[str, int]):
        self.stack = stack
        self._dtype = dtype
        self._memory = ort.OrtValue.ortvalue_from_shape_and_type(
            list(stack.shape), ONNX_TYPES[dtype], *device
        )
        # onnxruntime takes only memory that an OrtValue does not own as an initializer.
        self.value = self._view(slice(0, stack.shape[0]))
        self.value.update_inplace(host_value(initial, dtype))

    def write(self, slot: int, block: np.ndarray) -> None:
        """Overwrite the rows of one slot."""
        view = self._view(self.stack.rows(slot))
        view.update_inplace(host_value(np.ascontiguousarray(block), self._dtype))

    def _view(self, rows: slice) -> ort.OrtValue:
        return rows_view(self._memory, rows, self.stack.shape[1], self._dtype)
