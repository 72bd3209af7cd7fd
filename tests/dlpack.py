"""A DLPack exporter of any dtype, shape, strides, offset and device, as other libraries may export."""

from __future__ import annotations

import ctypes

CODES = {"int": 0, "float": 2, "bfloat": 4, "complex": 5}


class Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    pass


Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Exporter:
    """Exports the memory of a NumPy array as it is told to; `deleted` counts the calls of the deleter."""

    def __init__(self, memory, shape, kind, bits, *, strides=None, byte_offset=0, device=(1, 0), lanes=1):
        self.memory, self.device, self.deleted = memory, device, 0
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.strides = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
        tensor = Tensor(
            memory.ctypes.data,
            Device(*device),
            len(shape),
            DataType(CODES[kind], bits, lanes),
            self.shape,
            self.strides,
            byte_offset,
        )
        self.managed = Managed(tensor, None, Deleter(self._delete))

    def _delete(self, _):
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.managed), b"dltensor", None)
