"""Read and write .npy and .csv files chunk by chunk, so that a file need not fit into memory.

A chunk is as many entries of axis 0 as make up ``CHUNK_VALUES`` values, at least one. That rule is fixed, and
moments of chunks are merged in a fixed tree, so what comes out depends on the file alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._core import Moments

CHUNK_VALUES = 2**20
"""4 to 8 MiB of floats: work enough for every thread, and little beside the memory of any machine."""


class NpySource:
    """An array of float16, float32 or float64 in a .npy file, memory-mapped.

    With the channels on axis 0 there is no axis of samples to cut, and the whole array is one chunk.

    Raises:
        ValueError: No .npy file, a damaged one, or no axis ``channel_axis``.
        TypeError: Another dtype.
    """

    def __init__(self, path: Path, channel_axis: int) -> None:
        self.path = path
        try:
            self.array = np.asarray(np.lib.format.open_memmap(path, mode="r"))
        except ValueError as error:
            raise ValueError(f"{path}: no array can be read: {error}") from error
        if self.array.dtype == np.dtype("V2"):
            raise TypeError(f"{path}: raw values of 2 bytes, as NumPy stores bfloat16; save it as float32")
        if self.array.dtype.kind != "f" or self.array.itemsize > 8:
            raise TypeError(f"{path}: dtype was {self.array.dtype}, wanted float16, float32 or float64")
        shape, rank = self.array.shape, self.array.ndim
        if rank < 2 or not -rank <= channel_axis < rank:
            wanted = f"rank 2 or more and channels on axis {channel_axis}"
            raise ValueError(f"{path}: shape was {shape}, wanted {wanted}")
        self.channels = shape[channel_axis]
        self._one_chunk = channel_axis % rank == 0

    def chunks(self) -> Iterator[tuple[float, NDArray[Any]]]:
        """Yield the part read by then and views into the file."""
        rows, *rest = self.array.shape
        step = max(1, rows if self._one_chunk else CHUNK_VALUES // max(1, math.prod(rest)))
        for start in range(0, rows, step):
            yield min(1.0, (start + step) / rows), self.array[start : start + step]


class CsvSource:
    """Comma-separated finite numbers: a line is a sample, a column is a channel.

    The first line names the columns if none of its fields is a number.

    Args:
        path: The file, UTF-8.
        dtype: float32 or float64, what the numbers become.

    Raises:
        ValueError: An empty file or no text; and, while reading, by line and column: a field that is no
            finite number, a line of another number of fields, a blank line before the last.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        with self._open() as (_, text):
            reader = csv.reader(text)
            first = next(reader, [])
            if not first:
                raise ValueError(f"{path}: line 1: blank, wanted numbers or the names of the columns")
            self.header = None if any(map(_is_number, first)) else first
            self._skip = 0 if self.header is None else reader.line_num
        self.channels = len(first)

    def chunks(self) -> Iterator[tuple[float, NDArray[Any]]]:
        """Yield the part read by then and arrays of shape (lines, columns)."""
        step = max(1, CHUNK_VALUES // self.channels)
        size, first = self.path.stat().st_size, self._skip + 1
        with self._open() as (raw, text):
            lines = self._data_lines(text)
            while chunk := list(itertools.islice(lines, step)):
                yield raw.tell() / size, self._parse(chunk, first)
                first += len(chunk)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], IO[str]]]:
        try:
            with self.path.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
                yield raw, text
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path}: no comma-separated text: {error}") from error

    def _data_lines(self, text: IO[str]) -> Iterator[str]:
        blank = 0
        for number, line in enumerate(text, 1):
            if number <= self._skip:
                continue
            if not line.strip():
                blank = blank or number
            elif blank:
                raise ValueError(f"{self.path}: line {blank}: blank, wanted {self.channels} numbers")
            else:
                yield line

    def _parse(self, lines: list[str], first: int) -> NDArray[Any]:
        try:
            values = np.loadtxt(lines, self.dtype, comments=None, delimiter=",", quotechar='"', ndmin=2)
        except ValueError:
            values = np.empty((0, 0), self.dtype)
        if values.shape != (len(lines), self.channels):
            raise self._what_is_wrong(lines, first)
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"{self.path}: line {first + row}, {self._column(column)}: not finite as {self.dtype.name}"
            )
        return values

    def _what_is_wrong(self, lines: list[str], first: int) -> ValueError:
        """Find where the fast parser stumbled; what it says itself counts from the start of the chunk."""
        for number, line in enumerate(lines, first):
            fields = next(csv.reader([line]))
            for column, field in enumerate(fields[: self.channels]):
                if not _is_number(field):
                    return ValueError(
                        f"{self.path}: line {number}, {self._column(column)}: {field!r} is not a number"
                    )
            if len(fields) != self.channels:
                return ValueError(f"{self.path}: line {number}: {len(fields)} fields, wanted {self.channels}")
        return ValueError(f"{self.path}: lines {first} to {number}: wanted comma-separated numbers")

    def _column(self, index: int) -> str:
        return f"column {index + 1}" + (f" ({self.header[index]})" if self.header else "")


def merge_in_order(parts: Iterable[Moments]) -> Moments | None:
    """Merge moments in a binary tree over their order, which their number alone decides; None of none.

    Neighbours of equal size merge first, so that rounding errors grow with the logarithm of the number.
    """
    waiting: list[tuple[int, Moments]] = []
    for part in parts:
        size, merged = 1, part
        while waiting and waiting[-1][0] == size:
            merged = waiting.pop()[1].merge(merged)
            size *= 2
        waiting.append((size, merged))
    total: Moments | None = None
    for _, part in reversed(waiting):
        total = part if total is None else part.merge(total)
    return total


def npy_writer(file: IO[bytes], source: NpySource) -> Callable[[NDArray[Any]], None]:
    """Start an array of the shape and dtype of ``source``, and return what appends a chunk to it."""
    dtype = source.array.dtype.newbyteorder("=")
    descr, shape = np.lib.format.dtype_to_descr(dtype), source.array.shape
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})

    def append(chunk: NDArray[Any]) -> None:
        file.write(np.ascontiguousarray(chunk, dtype).data)

    return append


def csv_writer(file: IO[bytes], source: CsvSource) -> Callable[[NDArray[Any]], None]:
    """Start a file with the header of ``source``, and return what appends a chunk to it."""

    def write(rows: Iterable[list[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        file.write(text.getvalue().encode())

    if source.header is not None:
        write([source.header])
    # Both print the shortest digits that give the value back: NumPy those of float32, and Python, four times
    # faster, those of float64.
    return lambda chunk: write((chunk if chunk.dtype == np.float64 else chunk.astype(str)).tolist())


def _is_number(field: str) -> bool:
    # float() also reads underscores and the digits of every script, which the fast parser does not.
    if not field.isascii() or "_" in field:
        return False
    try:
        float(field)
    except ValueError:
        return False
    return True
