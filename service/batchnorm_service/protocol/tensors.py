"""Tensors as the protocol writes them: names of datatypes, JSON numbers, bytes (on little-endian hosts)."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, Final, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from batchnorm._core import JsonNumbers, json_cut_data, json_put_data
from batchnorm_service.errors import BodyTooLargeError, InvalidInputError, UnsupportedError

# A message, in memory that cannot be written or that can.
Bytes: TypeAlias = bytes | memoryview

DTYPES: Final = {"FP32": "float32", "FP64": "float64", "FP16": "float16", "BF16": "bfloat16"}
DATATYPES: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}
# As in Triton: 16-bit numbers travel as bytes alone.
JSON_DATATYPES: Final = frozenset({"FP32", "FP64"})

_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))


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


def cut_data(text: Bytes, max_elements: int) -> tuple[bytes, list[JsonNumbers]]:
    """Take the `data` arrays out of the JSON of a request: their numbers never become objects.

    NaN, Infinity and -Infinity are numbers too, and null is NaN.

    Returns:
        The text in which each array is `[i]`, and the arrays, of which it is the one of that index.

    Raises:
        InvalidInputError: the text is malformed; or an array has other items than numbers, is ragged, or has
            a finite number beyond the range of float64.
        BodyTooLargeError: there are more than `max_elements` numbers.
    """
    try:
        return json_cut_data(text if type(text) is bytes else np.frombuffer(text, np.uint8), max_elements)
    except ValueError as refusal:
        raise InvalidInputError(str(refusal)) from refusal
    except OverflowError as refusal:
        raise BodyTooLargeError(str(refusal)) from refusal


def parse_json(text: bytes, max_depth: int) -> Any:
    """Parse UTF-8 JSON, in which NaN, Infinity and -Infinity are numbers too.

    Raises:
        InvalidInputError: the text is not JSON, deeper than `max_depth`, or has a number beyond float64.
    """
    _check_depth(text, max_depth)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    # orjson is several times as fast and knows no NaN; a refused text is read again by one that does.
    try:
        return json.loads(str(text, "utf-8"), parse_float=_finite)
    except ValueError as refusal:
        raise InvalidInputError(f"the JSON of the request is malformed: {refusal}") from refusal


def numbers_from_json(data: JsonNumbers, shape: tuple[int, ...], datatype: str) -> NDArray[Any]:
    """Return the numbers of a `data` array, flat or nested as `shape` says.

    Raises:
        InvalidInputError: another count or nesting than `shape`, or a finite number beyond the range of the
            datatype.
    """
    nesting = tuple(data.shape)
    # Where a size is 0, nothing shows the sizes after it.
    nested = nesting == shape or (nesting[-1] == 0 and nesting == shape[: len(nesting)])
    if len(nesting) > 1 and not nested:
        raise InvalidInputError("data: nested otherwise than the shape says")
    if len(data) != math.prod(shape):
        raise InvalidInputError(f"data: {math.prod(shape)} numbers wanted for the shape, got {len(data)}")
    try:
        x = data.float32() if datatype == "FP32" else data.float64()
    except ValueError as refusal:
        raise InvalidInputError(str(refusal)) from refusal
    return view(x, shape, x.dtype)


def put_data(before: bytes, y: NDArray[Any], after: bytes, null: bool = False) -> memoryview:
    """Return a JSON text with the elements of y, row-major, as a flat array that gives their bits back.

    Each has its shortest text. NaN and infinities are the tokens NaN, Infinity and -Infinity, which Triton's
    clients read, or null.
    """
    return json_put_data(before, y.reshape(-1), after, null).data


def _check_depth(text: bytes, max_depth: int) -> None:
    """Refuse JSON nested too deep, in linear time whatever the text is."""
    if text.count(b"[") + text.count(b"{") <= max_depth:
        return
    unescaped = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(unescaped.translate(_SQUARE, _NOT_STRUCTURE), np.uint8)
    in_string = np.bitwise_xor.accumulate(marks == ord('"'))
    steps = ((marks == ord("[")).astype(np.int8) - (marks == ord("]"))) * ~in_string
    if np.cumsum(steps, dtype=np.int32).max(initial=0) > max_depth:
        raise InvalidInputError(f"the JSON of the request is nested deeper than {max_depth} levels")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {reprlib.repr(text)} is beyond the range of float64")
    return value
