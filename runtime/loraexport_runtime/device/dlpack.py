"""Rows of a buffer as a tensor of their own."""

import ctypes

import onnxruntime as ort

from .dtypes import DLPACK_TYPES

# Prototypes of their own: those of `ctypes.pythonapi` are everybody's.
_LIBC = ctypes.CDLL(None)
_malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("malloc", _LIBC))
_FREE = ctypes.cast(_LIBC.free, ctypes.c_void_p).value
_make_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    """DLPack's own struct, and behind it the shape that it points to."""

    _fields_ = (
        ("tensor", _DLTensor),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * 2),
    )


def rows_view(value: ort.OrtValue, rows: slice, width: int, dtype: str) -> ort.OrtValue:
    """Some rows of a matrix as an OrtValue that does not own its memory; keep `value` alive.

    The DLPack struct is malloc's and its deleter is free, so its life ends with the last OrtValue
    that uses it, whatever Python has collected before.
    """
    address = _malloc(ctypes.sizeof(_DLManagedTensor))
    code, bits = DLPACK_TYPES[dtype]
    device_type, device_id = map(int, value.__dlpack_device__())
    managed = _DLManagedTensor.from_address(address)
    managed.shape[:] = rows.stop - rows.start, width
    managed.manager_context = None
    managed.deleter = _FREE
    managed.tensor = _DLTensor(
        data=value.data_ptr() + rows.start * width * bits // 8,
        device_type=device_type,
        device_id=device_id,
        ndim=2,
        code=code,
        bits=bits,
        lanes=1,
        shape=address + _DLManagedTensor.shape.offset,
    )
    return ort.OrtValue.from_dlpack(_make_capsule(address, b"dltensor", None))
