"""Tensors as the protocol writes them: names of datatypes, JSON numbers, bytes (on little-endian hosts)."""

from __future__ import annotations

import json
import math
import re
import reprlib
from itertools import chain
from types import NoneType
from typing import Any, Final, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from batchnorm_service.errors import InvalidInputError, UnsupportedError

Bytes: TypeAlias = bytes | bytearray | memoryview

DTYPES: Final = {"FP32": "float32", "FP64": "float64", "FP16": "float16", "BF16": "bfloat16"}
DATATYPES: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}
# As in Triton: 16-bit numbers travel as bytes alone.
JSON_DATATYPES: Final = frozenset({"FP32", "FP64"})
# Triton's limit; the fallback parser recurses, and this keeps it far from the interpreter's limit.
MAX_JSON_DEPTH: Final = 100

# Readers of JSON round to float64 and then to float32. Of all float32 (all were tried) this one and its
# negative alone have a shortest text, 7.038531e-26, which so becomes a neighbour; a float64 has more digits.
_MISREAD = np.uint32(0x15AE43FD).view(np.float32)
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
    buffer: Bytes | NDArray[Any], offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return an array over the memory of `buffer` from `offset` on, without a copy; it may be misaligned.

    Raises:
        InvalidInputError: NumPy has no array of that shape (it holds no element, but its sizes are absurd).
    """
    try:
        return np.ndarray(shape, dtype, buffer=buffer, offset=offset)
    except ValueError as refusal:
        raise InvalidInputError(f"shape {list(shape)}: {refusal}") from refusal


def parse_json(text: bytes) -> Any:
    """Parse UTF-8 JSON, in which NaN, Infinity and -Infinity are numbers too.

    Raises:
        InvalidInputError: the text is not JSON, deeper than `MAX_JSON_DEPTH`, or has a number beyond float64.
    """
    _check_depth(text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    # orjson is several times as fast and knows no NaN; a refused text is read again by one that does.
    try:
        return json.loads(str(text, "utf-8"), parse_float=_finite)
    except ValueError as refusal:
        raise InvalidInputError(f"the JSON of the request is malformed: {refusal}") from refusal


def numbers_from_json(data: list[Any], shape: tuple[int, ...], datatype: str) -> NDArray[Any]:
    """Return the numbers of a `data` array, flat or nested as `shape` says; null is NaN.

    Raises:
        InvalidInputError: other items than numbers, another count or nesting than `shape`, or a finite number
            beyond the range of the datatype.
    """
    items = _flatten(data, shape)
    kinds = {*map(type, items)} - {float, int, NoneType}
    if kinds:
        raise InvalidInputError(f"data: numbers or null wanted, got {min(kind.__name__ for kind in kinds)}")
    try:
        wide = np.array(items, dtype=np.float64)
    except OverflowError:
        raise InvalidInputError(f"data: an integer is beyond the range of {datatype}") from None
    with np.errstate(over="ignore"):  # looked for in the next line
        x = wide.astype(DTYPES[datatype])
    if (np.isinf(x) & np.isfinite(wide)).any():
        raise InvalidInputError(f"data: a finite number is beyond the range of {datatype}")
    return view(x, 0, shape, x.dtype)


def numbers_to_json(y: NDArray[Any]) -> bytes:
    """Return the elements of y, row-major, as a flat JSON array that gives their bits back.

    Each has its shortest text; NaN and infinities are the tokens NaN, Infinity and -Infinity.
    """
    flat = y.reshape(-1)
    if flat.dtype == np.float32 and (np.abs(flat) == _MISREAD).any():
        flat = flat.astype(np.float64)
    text = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)
    odd = flat[~np.isfinite(flat)]
    if not odd.size:
        return text
    # orjson writes null for what is not finite; Triton's clients read the tokens.
    tokens = iter(np.where(np.isnan(odd), b"NaN", np.where(odd > 0, b"Infinity", b"-Infinity")).tolist())
    return re.sub(rb"null", lambda _: next(tokens), text)


def _check_depth(text: bytes) -> None:
    """Refuse JSON nested too deep, in linear time whatever the text is."""
    if text.count(b"[") + text.count(b"{") <= MAX_JSON_DEPTH:
        return
    unescaped = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(unescaped.translate(_SQUARE, _NOT_STRUCTURE), np.uint8)
    in_string = np.bitwise_xor.accumulate(marks == ord('"'))
    steps = ((marks == ord("[")).astype(np.int8) - (marks == ord("]"))) * ~in_string
    if np.cumsum(steps, dtype=np.int32).max(initial=0) > MAX_JSON_DEPTH:
        raise InvalidInputError(f"the JSON of the request is nested deeper than {MAX_JSON_DEPTH} levels")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {reprlib.repr(text)} is beyond the range of float64")
    return value


def _flatten(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    if not data or type(data[0]) is not list:
        if len(data) != math.prod(shape):
            raise InvalidInputError(f"data: {math.prod(shape)} numbers wanted for the shape, got {len(data)}")
        return data
    items: list[Any] = [data]
    for size in shape:
        if {*map(type, items)} - {list} or {*map(len, items)} - {size}:
            raise InvalidInputError("data: nested otherwise than the shape says")
        items = list(chain.from_iterable(items))
    return items
