"""Addresses of tensors, however they are made: numpy, torch, DLPack, or plain integers.

Knows where the first byte of a tensor is and that it is contiguous; knows nothing of stores.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

Addresses: TypeAlias = npt.NDArray[np.uint64]

_BITS_PER_BYTE = 8


class _DLTensor(C.Structure):
    """``DLTensor`` of the DLPack specification, version 0 and 1."""

    _fields_: ClassVar = [
        ("data", C.c_void_p),
        ("device_type", C.c_int32),
        ("device_id", C.c_int32),
        ("ndim", C.c_int32),
        ("type_code", C.c_uint8),
        ("type_bits", C.c_uint8),
        ("type_lanes", C.c_uint16),
        ("shape", C.POINTER(C.c_int64)),
        ("strides", C.POINTER(C.c_int64)),
        ("byte_offset", C.c_uint64),
    ]


def _capsule_extent(capsule: Any) -> tuple[int, int]:
    get = C.pythonapi.PyCapsule_GetPointer
    get.restype = C.c_void_p
    get.argtypes = [C.py_object, C.c_char_p]
    pointer = get(capsule, b"dltensor")
    tensor = C.cast(pointer, C.POINTER(_DLTensor)).contents
    count = 1
    expected = 1
    for i in reversed(range(tensor.ndim)):
        length = tensor.shape[i]
        if tensor.strides and length > 1 and tensor.strides[i] != expected:
            raise ValueError(
                "the tensor is not contiguous: pass a contiguous one, or describe its rows with "
                "the option tensor_shape_list and pass its base address as an integer"
            )
        expected *= length
        count *= length
    size = count * tensor.type_bits * tensor.type_lanes // _BITS_PER_BYTE
    return int(tensor.data or 0) + int(tensor.byte_offset), size


def extent_of(tensor: Any) -> tuple[int, int]:
    """``(address, bytes)`` of a contiguous tensor."""
    if isinstance(tensor, np.ndarray):
        if not tensor.flags.c_contiguous:
            raise ValueError(f"the array of shape {tensor.shape} is not contiguous")
        return int(tensor.__array_interface__["data"][0]), int(tensor.nbytes)
    data_ptr = getattr(tensor, "data_ptr", None)
    if data_ptr is not None:
        if not tensor.is_contiguous():
            raise ValueError(f"the tensor of shape {tuple(tensor.shape)} is not contiguous")
        return int(data_ptr()), int(tensor.numel()) * int(tensor.element_size())
    if hasattr(tensor, "__dlpack__"):
        return _capsule_extent(tensor.__dlpack__())
    raise TypeError(
        f"{type(tensor).__name__} has no address: pass a numpy array, a torch tensor, an object with "
        "__dlpack__, or an integer"
    )


def address_of(tensor: Any) -> int:
    """The address of a tensor's first byte; integers are addresses already."""
    if isinstance(tensor, (int, np.integer)):
        return int(tensor)
    return extent_of(tensor)[0]


def matrix(rows: Any, count: int) -> tuple[Addresses, list[Any]]:
    """A ``count`` x slices matrix of addresses, and the objects that own the memory.

    A numpy array of an integer type of two dimensions *is* a matrix of addresses and is taken as it
    stands. Anything else is a sequence with one item per block: a tensor, or a sequence of them.
    """
    if isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.dtype in (np.uint64, np.int64):
        if rows.shape[0] != count:
            raise ValueError(f"addresses has {rows.shape[0]} rows, blocks has {count}")
        return np.ascontiguousarray(rows).view(np.uint64), []
    keep: list[Any] = []
    table: list[list[int]] = []
    items: Sequence[Any] | Iterable[Any] = rows
    for row in items:
        slices = list(row) if isinstance(row, (list, tuple)) else [row]
        keep.extend(slices)
        table.append([address_of(item) for item in slices])
    if len(table) != count:
        raise ValueError(f"addresses has {len(table)} rows, blocks has {count}")
    if len({len(row) for row in table}) > 1:
        raise ValueError("every block needs the same number of tensor slices")
    return np.array(table, dtype=np.uint64).reshape(count, -1), keep
