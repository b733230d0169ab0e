"""One table of dtypes: numpy's, ONNX's, DLPack's."""

import ml_dtypes
import numpy as np

from ..contract.onnx_file import TENSOR_TYPES

NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
}
ONNX_TYPES = TENSOR_TYPES
FLOAT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}
"""As a session of onnxruntime names the types of its inputs and outputs."""
DLPACK_TYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "int64": (0, 64)}
