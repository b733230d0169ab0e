"""numpy arrays <-> torch tensors, bfloat16 included (numpy knows it through ml_dtypes)."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


def to_torch(array: np.ndarray) -> Tensor:
    """A tensor over the same memory where numpy allows it."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A numpy array on the host; bfloat16 as `ml_dtypes.bfloat16`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
