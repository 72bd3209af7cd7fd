"""Reading and writing of .npy and .csv data, files or pipes, in chunks that fit into memory.

A chunk has as many entries of axis 0 as make up `CHUNK_VALUES` values, but at least one. That rule is fixed,
and moments of chunks are merged in a fixed tree, so the result depends on the data alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchnorm._core import CoMoments, Moments

CHUNK_VALUES = 2**20
"""4 to 8 MiB of floats: work enough for every thread, and little beside the memory of any machine."""

_Statistics = TypeVar("_Statistics", Moments, CoMoments)

Header: TypeAlias = Literal["auto", "yes", "no"]

STANDARD_INPUT = Path("-")

# The first byte of every .npy file; no UTF-8 text begins with it.
_NPY_FIRST_BYTE = b"\x93"
# The forms in which pandas and R write or read a missing value, in lower case.
_MISSING = frozenset(("", "#n/a", "#na", "<na>", "n/a", "na", "nan", "none", "null"))
_DESCRIPTOR_FOLDERS = (Path("/dev"), Path("/dev/fd"))


@contextlib.contextmanager
def open_source(
    path: Path, channel_axis: int, dtype: np.dtype[Any], header: Header
) -> Iterator[NpySource | CsvSource]:
    """Open the array or table at `path`, which is read once, from start to end.

    A file is an array or a table by its suffix. Standard input (`-`), a pipe or a device is an array if it
    begins like a .npy file, else a table.

    Args:
        path: A .npy or .csv file, a pipe or device that holds one, or `-`.
        channel_axis: Axis of the channels of an array.
        dtype: float32 or float64, in which the numbers of a table have to be finite.
        header: Whether the first line of a table names its columns.

    Raises:
        OSError: The data cannot be read; `filename` is the name of the source.
        ValueError: The file has another suffix, or as documented by `NpySource` and `CsvSource`.
        TypeError: As documented by `NpySource`.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    stream = not path.is_file() or path.absolute().parent in _DESCRIPTOR_FOLDERS
    suffix = path.suffix.lower()
    if not stream and suffix not in (NpySource.suffix, CsvSource.suffix):
        raise ValueError(f"{name}: wanted a name that ends in .npy or .csv")
    with contextlib.ExitStack() as stack:
        with _named(name):
            file = stack.enter_context(_standard_input() if path == STANDARD_INPUT else path.open("rb"))
            is_npy = file.peek(1)[:1] == _NPY_FIRST_BYTE if stream else suffix == NpySource.suffix
        if is_npy:
            if header != "auto":
                raise ValueError(f"--header: was {header}, but {name} is a .npy, which has no such line")
            yield NpySource(file, name, channel_axis, mapped=not stream)
        else:
            yield CsvSource(file, name, dtype, header)


class NpySource:
    """An array of float16, float32 or float64 in .npy format.

    A file is memory-mapped. A stream is read chunk by chunk, but if its array is in Fortran order, all of it
    is read into memory first. If the channels are on axis 0, the whole array is one chunk.

    Args:
        file: The open file or stream, at the start of the array.
        name: Name of the source in errors; its path if `mapped`.
        channel_axis: Axis of the channels.
        mapped: Whether it is a file to map into memory.

    Raises:
        ValueError: The data are not .npy or are damaged, or the array has no axis `channel_axis`.
        TypeError: The array has another dtype.
    """

    suffix = ".npy"

    def __init__(self, file: io.BufferedReader, name: str, channel_axis: int, *, mapped: bool) -> None:
        self.name, self._file = name, file
        self._mapped: NDArray[Any] | None = None
        self._fortran_order = False
        try:
            with _named(name):
                if mapped:
                    self._mapped = np.asarray(np.lib.format.open_memmap(name, mode="r"))
                    self.shape, self.dtype = self._mapped.shape, self._mapped.dtype
                else:
                    self.shape, self._fortran_order, self.dtype = _npy_header(file)
        except ValueError as error:
            raise ValueError(f"{name}: no array can be read: {error}") from error
        if self.dtype == np.dtype("V2"):
            raise TypeError(f"{name}: raw values of 2 bytes, as NumPy stores bfloat16; save it as float32")
        if self.dtype.kind != "f" or self.dtype.itemsize > 8:
            raise TypeError(f"{name}: dtype was {self.dtype}, wanted float16, float32 or float64")
        rank = len(self.shape)
        if rank < 2 or not -rank <= channel_axis < rank:
            wanted = f"rank 2 or more and channels on axis {channel_axis}"
            raise ValueError(f"{name}: shape was {self.shape}, wanted {wanted}")
        self.channels = self.shape[channel_axis]
        self._one_chunk = channel_axis % rank == 0

    def chunks(self) -> Iterator[tuple[float, NDArray[Any]]]:
        """Yield the fraction read so far, and the next chunk of entries of axis 0."""
        rows, *rest = self.shape
        step = max(1, rows if self._one_chunk else CHUNK_VALUES // max(1, math.prod(rest)))
        whole = self._read(self.shape[::-1]).T if self._fortran_order else self._mapped
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield stop / rows, self._read((stop - start, *rest)) if whole is None else whole[start:stop]

    def _read(self, shape: tuple[int, ...]) -> NDArray[Any]:
        values = np.empty(shape, self.dtype)
        missing = values.reshape(-1).view(np.uint8).data
        while missing:
            with _named(self.name):
                count = self._file.readinto(missing)
            if not count:
                raise ValueError(f"{self.name}: no array can be read: it ends before its last value")
            missing = missing[count:]
        return values


class CsvSource:
    """Comma-separated finite numbers: a line is a sample, a column is a channel.

    With `header="auto"`, the first line names the columns if no field of it is a number, and not all are
    missing values. A first line of numbers is a sample, or an error if it could just as well be a header.

    Args:
        file: The open file or stream, at the start of the table, which is UTF-8.
        name: Name of the source in errors.
        dtype: float32 or float64, in which the numbers have to be finite.
        header: Whether the first line names the columns.

    Raises:
        ValueError: There are no lines, the data are not text, or the first line could be a header or a
            sample. While reading, and with line and column: a field is not a finite number, a line has
            another number of fields, or a line before the last is blank.
    """

    suffix = ".csv"

    def __init__(self, file: io.BufferedReader, name: str, dtype: np.dtype[Any], header: Header) -> None:
        self.name, self.dtype, self._file = name, dtype, file
        status = os.fstat(file.fileno())
        self._size = status.st_size if stat.S_ISREG(status.st_mode) else None
        # Kept as an attribute, because it closes the file when it is collected.
        self._text = text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        self._auto = header == "auto"
        read: list[str] = []
        with self._reading():
            lines = _recorded(text, read)
            first = next(csv.reader(lines), [])
            if not first:
                raise ValueError(f"{name}: line 1: blank, wanted numbers or the names of the columns")
            self.channels = len(first)
            self._step = max(1, CHUNK_VALUES // self.channels)
            named = _is_header(first) if self._auto else header == "yes"
            self.header = first if named else None
            self._first_line = len(read) + 1 if named else 1
            if self._auto and not named and _may_be_header(first, itertools.islice(lines, self._step)):
                raise ValueError(
                    f"{name}: line 1 may be a header or a sample; say which by --header yes or --header no"
                )
        self._lines = text if named else itertools.chain(read, text)

    def chunks(self) -> Iterator[tuple[float | None, NDArray[Any]]]:
        """Yield the fraction read so far (None for a stream), and the next chunk as (lines, columns)."""
        first = self._first_line
        lines = self._data_lines()
        with self._reading():
            while chunk := list(itertools.islice(lines, self._step)):
                values = self._parse(chunk, first)
                yield self._file.tell() / self._size if self._size else None, values
                first += len(chunk)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with _named(self.name):
                yield
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.name}: no comma-separated text: {error}") from error

    def _data_lines(self) -> Iterator[str]:
        blank = 0
        for number, line in enumerate(self._lines, self._first_line):
            if not line.strip():
                blank = blank or number
            elif blank:
                raise ValueError(
                    f"{self.name}: line {blank}: blank, wanted {counted(self.channels, 'number')}"
                )
            else:
                yield line

    def _parse(self, lines: list[str], first: int) -> NDArray[Any]:
        try:
            values = np.loadtxt(lines, np.float64, comments=None, delimiter=",", quotechar='"', ndmin=2)
        except ValueError:
            values = np.empty((0, 0))
        if values.shape != (len(lines), self.channels):
            raise self._what_is_wrong(lines, first)
        with np.errstate(over="ignore", under="ignore"):
            finite = np.isfinite(values.astype(self.dtype, copy=False))
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise ValueError(
                f"{self.name}: line {first + row}, {self._column(column)}: not finite as {self.dtype.name}"
            )
        return values

    def _what_is_wrong(self, lines: list[str], first: int) -> ValueError:
        """Return the error for lines that the fast parser rejects, by line and column of the file.

        The parser's own message counts from the start of the chunk.
        """
        for number, line in enumerate(lines, first):
            fields = next(csv.reader([line]))
            for column, field in enumerate(fields[: self.channels]):
                if not _is_number(field):
                    hint = " (--header yes makes line 1 a header)" * (number == 1 and self._auto)
                    return ValueError(
                        f"{self.name}: line {number}, {self._column(column)}: {field!r} is not a number{hint}"
                    )
            if len(fields) != self.channels:
                return ValueError(
                    f"{self.name}: line {number}: {counted(len(fields), 'field')}, wanted {self.channels}"
                )
        return ValueError(f"{self.name}: lines {first} to {number}: wanted comma-separated numbers")

    def _column(self, index: int) -> str:
        return f"column {index + 1}" + (f" ({self.header[index]})" if self.header else "")


def counted(number: int, noun: str) -> str:
    """Return "1 channel", "2 channels" and so on."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def merge_in_order(parts: Iterable[_Statistics]) -> _Statistics | None:
    """Merge moments or co-moments, in their order, in a binary tree; None if there are none.

    The shape of the tree depends on the number of parts alone.
    Neighbours of equal size merge first, so that rounding errors grow with the logarithm of the number.
    """
    waiting: list[tuple[int, _Statistics]] = []
    for part in parts:
        size, merged = 1, part
        while waiting and waiting[-1][0] == size:
            merged = waiting.pop()[1].merge(merged)
            size *= 2
        waiting.append((size, merged))
    total: _Statistics | None = None
    for _, part in reversed(waiting):
        total = part if total is None else part.merge(total)
    return total


def rounding_error(values: NDArray[Any], dtype: np.dtype[Any], channel_axis: int) -> NDArray[np.float64]:
    """Return the largest error of each channel from rounding its values to `dtype`."""
    channel_axis %= values.ndim
    if dtype.itemsize >= values.dtype.itemsize:
        return np.zeros(values.shape[channel_axis])
    if values.size > CHUNK_VALUES:  # in halves, so that temporary memory stays small
        axis = int(np.argmax(values.shape))
        parts = [rounding_error(half, dtype, channel_axis) for half in np.array_split(values, 2, axis)]
        return np.concatenate(parts) if axis == channel_axis else np.maximum(*parts)
    with np.errstate(over="ignore", under="ignore"):
        error = np.abs(values - values.astype(dtype))
    by_channel = np.moveaxis(error, channel_axis, 0).reshape(values.shape[channel_axis], -1)
    return np.asarray(by_channel.max(axis=1, initial=0), np.float64)


def npy_writer(file: IO[bytes], source: NpySource) -> Callable[[NDArray[Any]], None]:
    """Start a .npy file with the shape and dtype of `source`, and return a function that appends a chunk."""
    dtype = source.dtype.newbyteorder("=")
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": source.shape}
    )

    def append(chunk: NDArray[Any]) -> None:
        file.write(np.ascontiguousarray(chunk, dtype).data)

    return append


def csv_writer(file: IO[bytes], source: CsvSource) -> Callable[[NDArray[Any]], None]:
    """Start a .csv file with the header of `source`, and return a function that appends a chunk."""

    def write(rows: Iterable[list[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        file.write(text.getvalue().encode())

    if source.header is not None:
        write([source.header])
    # Both print the shortest digits that give the value back: NumPy those of float32, and Python, four times
    # faster, those of float64.
    return lambda chunk: write((chunk if chunk.dtype == np.float64 else chunk.astype(str)).tolist())


def _standard_input() -> io.BufferedReader:
    return open(0, "rb", closefd=False)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Add the name of the source to OSErrors in the block, which those of an open file lack."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str):
            error.filename = name
        raise


def _npy_header(file: io.BufferedReader) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a .npy: the shape, whether the array is in Fortran order, and the dtype."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:  # 3.0 is for structured arrays
        raise ValueError(f"format version was {version}, wanted (1, 0) or (2, 0)")
    shape, fortran_order, dtype = readers[version](file)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"shape was {shape}, which is not a valid shape")
    return shape, fortran_order, dtype


def _recorded(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    """Yield `lines`, and append each to `read`."""
    for line in lines:
        read.append(line)
        yield line


def _is_header(fields: list[str]) -> bool:
    missing = all(field.strip().casefold() in _MISSING for field in fields)
    return not missing and not any(map(_is_number, fields))


def _may_be_header(first: list[str], lines: Iterable[str]) -> bool:
    """Return whether a first line of numbers could be the names of the columns.

    It could if the numbers are 0, 1, 2, …, as pandas names the columns of an array; or if all are written as
    integers, and in some column none of the numbers below is.
    """
    if not all(map(_is_number, first)):
        return False
    if [float(field) for field in first] == list(range(len(first))):
        return True
    if not all(map(_is_integer, first)):
        return False
    undecided, fractional = set(range(len(first))), set()
    for line in lines:
        fields = next(csv.reader([line]), [])
        for column in sorted(undecided & set(range(len(fields)))):
            if _is_integer(fields[column]):
                undecided.remove(column)
            elif _is_number(fields[column]):
                fractional.add(column)
        if not undecided:
            break
    return bool(undecided & fractional)


def _is_integer(field: str) -> bool:
    return _is_number(field) and field.strip().lstrip("+-").isdigit()


def _is_number(field: str) -> bool:
    # float() also accepts underscores and the digits of every script, which the fast parser does not.
    if not field.isascii() or "_" in field:
        return False
    try:
        float(field)
    except ValueError:
        return False
    return True
