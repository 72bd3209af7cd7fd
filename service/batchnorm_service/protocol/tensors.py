"""Tensors as the protocol writes them: names of datatypes, JSON numbers, bytes (on little-endian hosts)."""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from batchnorm._core import json_cut_data, json_parse, json_put_data
from batchnorm_service.errors import BodyTooLargeError, InvalidInputError, UnsupportedError

# A message, in memory that cannot be written or that can.
Bytes: TypeAlias = bytes | memoryview

DTYPES: Final = {"FP32": "float32", "FP64": "float64", "FP16": "float16", "BF16": "bfloat16"}
DATATYPES: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}
# As in Triton: 16-bit numbers travel as bytes alone.
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
        InvalidInputError: NumPy has no array of that shape (it holds no element, but its sizes are absurd).
    """
    try:
        return np.ndarray(shape, dtype, buffer)
    except ValueError as refusal:
        raise InvalidInputError(f"shape {list(shape)}: {refusal}") from refusal


def cut_data(text: Bytes, max_elements: int, max_depth: int) -> tuple[bytes, list[Data]]:
    """Take the `data` arrays out of the JSON of a request: their numbers never become objects.

    NaN, Infinity and -Infinity are numbers too, and null is NaN.

    Returns:
        The text in which each array is `[i]`, and the arrays, of which it is the one of that index: of
        float32 where the datatype of their object is FP32, else of float64.

    Raises:
        InvalidInputError: The text is malformed or deeper than `max_depth`; or an array has other items than
            numbers, is ragged, or has a finite number beyond the range of its datatype.
        BodyTooLargeError: There are more than `max_elements` numbers.
    """
    try:
        given = text if type(text) is bytes else np.frombuffer(text, np.uint8)
        return json_cut_data(given, max_elements, max_depth)
    except ValueError as refusal:
        raise InvalidInputError(str(refusal)) from refusal
    except OverflowError as refusal:
        raise BodyTooLargeError(str(refusal)) from refusal


def parse_json(text: bytes, max_depth: int) -> Any:
    """Parse UTF-8 JSON, in which NaN, Infinity and -Infinity are numbers too.

    Raises:
        InvalidInputError: The text is malformed or deeper than `max_depth`, or has a number beyond float64.
    """
    try:
        return json_parse(text, max_depth)
    except ValueError as refusal:
        raise InvalidInputError(str(refusal)) from refusal


def shaped(data: Data, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the numbers of a `data` array, flat or nested as `shape` says, in this shape.

    Raises:
        InvalidInputError: Another count or nesting than `shape`.
    """
    x, lengths = data
    nesting = tuple(lengths)
    # Where a size is 0, nothing shows the sizes after it.
    nested = nesting == shape or (nesting[-1] == 0 and nesting == shape[: len(nesting)])
    if len(nesting) > 1 and not nested:
        raise InvalidInputError("data: nested otherwise than the shape says")
    if x.size != math.prod(shape):
        raise InvalidInputError(f"data: {math.prod(shape)} numbers wanted for the shape, got {x.size}")
    return view(x, shape, x.dtype)


def put_data(before: bytes, y: NDArray[Any], after: bytes, null: bool = False) -> memoryview:
    """Return a JSON text with the elements of y, row-major, as a flat array that gives their bits back.

    Each has its shortest text. NaN and infinities are the tokens NaN, Infinity and -Infinity, which Triton's
    clients read, or null.
    """
    return json_put_data(before, y.reshape(-1), after, null).data
