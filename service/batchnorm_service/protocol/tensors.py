"""Tensors in the protocol's forms: names of datatypes, JSON numbers, bytes (on little-endian hosts)."""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from batchnorm._core import json_cut_data, json_parse, json_put_data
from batchnorm_service.errors import BodyTooLargeError, InvalidInputError, UnsupportedError

# A message, in read-only or in writable memory.
Bytes: TypeAlias = bytes | memoryview

DTYPES: Final = {"FP32": "float32", "FP64": "float64", "FP16": "float16", "BF16": "bfloat16"}
DATATYPES: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}
# As in Triton, 16-bit numbers are sent as bytes only.
JSON_DATATYPES: Final = frozenset({"FP32", "FP64"})

# The numbers of a `data` array, flat, and the lengths of its nested arrays, outermost first.
Data: TypeAlias = tuple[NDArray[Any], list[int]]


def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """Return the dtype of a datatype of `DTYPES`.

    Raises:
        UnsupportedError: BF16 without the `ml_dtypes` package.
    """
    if datatype != "BF16":
        return np.dtype(DTYPES[datatype])
    try:
        import ml_dtypes
    except ImportError:
        raise UnsupportedError("BF16 needs the package ml_dtypes in the environment of the service") from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def view(
    buffer: bytearray | memoryview | NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return an array over the memory of `buffer`, without a copy; it may be misaligned.

    Raises:
        InvalidInputError: NumPy cannot make an array of that shape (it has no elements, but other sizes are
            too large).
    """
    try:
        return np.ndarray(shape, dtype, buffer)
    except ValueError as reason:
        raise InvalidInputError(f"shape {list(shape)}: {reason}") from reason


def cut_data(text: Bytes, max_elements: int, max_depth: int) -> tuple[bytes, list[Data]]:
    """Take the `data` arrays out of the JSON of a request, without making Python objects of their numbers.

    NaN, Infinity and -Infinity are read as numbers, and null is read as NaN.

    Returns:
        The text with `[i]` in place of the i-th array, and the arrays: float32 if the datatype of their
        object is FP32, else float64.

    Raises:
        InvalidInputError: The text is malformed or deeper than `max_depth`; or an array has other items than
            numbers, is ragged, or has a finite number beyond the range of its datatype.
        BodyTooLargeError: There are more than `max_elements` numbers.
    """
    try:
        given = text if type(text) is bytes else np.frombuffer(text, np.uint8)
        return json_cut_data(given, max_elements, max_depth)
    except ValueError as reason:
        raise InvalidInputError(str(reason)) from reason
    except OverflowError as reason:
        raise BodyTooLargeError(str(reason)) from reason


def parse_json(text: bytes, max_depth: int) -> Any:
    """Parse UTF-8 JSON; NaN, Infinity and -Infinity are read as numbers.

    Raises:
        InvalidInputError: The text is malformed or deeper than `max_depth`, or has a number beyond float64.
    """
    try:
        return json_parse(text, max_depth)
    except ValueError as reason:
        raise InvalidInputError(str(reason)) from reason


def shaped(data: Data, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the numbers of a `data` array, which is flat or nested like `shape`, in this shape.

    Raises:
        InvalidInputError: The number of elements or the nesting does not match `shape`.
    """
    x, lengths = data
    nesting = tuple(lengths)
    # If a size is 0, the nesting does not show the sizes after it.
    nested = nesting == shape or (nesting[-1] == 0 and nesting == shape[: len(nesting)])
    if len(nesting) > 1 and not nested:
        raise InvalidInputError("data: the nesting does not match the shape")
    if x.size != math.prod(shape):
        raise InvalidInputError(f"data: {math.prod(shape)} numbers wanted for the shape, got {x.size}")
    return view(x, shape, x.dtype)


def put_data(before: bytes, y: NDArray[Any], after: bytes, null: bool = False) -> memoryview:
    """Return a JSON text with the elements of y, row-major, as a flat array of numbers.

    Each number has the fewest digits that give its bits back. NaN and infinities are null, or the tokens NaN,
    Infinity and -Infinity, which Triton's clients read.
    """
    return json_put_data(before, y.reshape(-1), after, null).data
