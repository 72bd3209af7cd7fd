"""Calibration data: batches of inputs of a model, from files, arrays, or any iterable of feeds."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from batchnorm._checks import integer
from batchnorm.onnx.graph import Graph

Feeds: TypeAlias = dict[str, NDArray[Any]]
"""A batch: an array for each input of the model, by name."""

Feed: TypeAlias = Mapping[str, Any] | NDArray[Any]
"""A batch as callers give it: arrays by input name, or one array where the model has one input."""

PathLike: TypeAlias = str | os.PathLike[str]

Batches: TypeAlias = (
    PathLike
    | NDArray[Any]
    | Mapping[str, Any]
    | Iterable[PathLike]
    | Iterable[Feed]
    | Callable[[], Iterable[Feed]]
)
"""Calibration data as callers give them; see `batchnorm.onnx.recalibrate`."""

AGAIN = "wanted a list, a path, or a callable that returns an iterable"
"""What is wanted where the data are gone over more than once."""

_Rows: TypeAlias = Iterator[tuple[float | None, Feed]]

_BATCH = 32  # examples of a batch where the model fixes no number
_SUFFIXES = (".npy", ".npz")


class Calibration:
    """Batches for a model, each checked against the inputs of the model.

    Args:
        graph: The model.
        batches: The data; see `batchnorm.onnx.recalibrate`.
        batch_size: Examples of a batch, for data that are cut into batches; None is the size that the model
            fixes, or 32.
        argument: Name of `batches` in errors.

    Attributes:
        fixed: The size that the model fixes for the first axis of its inputs, the smallest of several; None
            if it fixes none.
        again: Whether the data can be gone over more than once.
        left_out: Number of examples at the end that filled no batch of that size, once the data have been
            gone over.

    Raises:
        OSError: A file or folder cannot be read.
        TypeError: `batches` is none of what is wanted, or `batch_size` is no integer.
        ValueError: `batch_size` is below 1 or not the one that the model fixes, or there is no file of data.
    """

    def __init__(
        self, graph: Graph, batches: Batches, batch_size: int | None = None, *, argument: str = "batches"
    ) -> None:
        self._argument = argument
        self._elements = {name: entry.type.tensor_type.elem_type for name, entry in graph.inputs.items()}
        self._wanted = {name: _shape_of(entry) for name, entry in graph.inputs.items()}
        sizes = {shape[0] for shape in self._wanted.values() if shape and shape[0] is not None}
        self.fixed = min(sizes, default=None)
        self._size = _batch_size(batch_size, sizes)
        self.again, self.left_out = True, 0
        self._source = self._source_of([batches] if isinstance(batches, str | os.PathLike) else batches)

    def _source_of(self, batches: Any) -> Callable[[], _Rows]:
        """Return a function that begins to go over the data."""
        if isinstance(batches, np.ndarray | Mapping):
            return lambda: self._cut([(0.0, 1.0, batches, self._argument)])
        if callable(batches):
            return lambda: _feeds(batches())
        if isinstance(batches, list | tuple) and batches and _all_paths(batches):
            files = _files(batches)
            return lambda: self._cut(
                (position / len(files), 1 / len(files), _load(path), str(path))
                for position, path in enumerate(files)
            )
        if isinstance(batches, Iterable):
            self.again = iter(batches) is not batches
            return lambda: _feeds(batches)
        wanted = "a path, an array, a dict of arrays, an iterable of batches or a callable that returns one"
        raise TypeError(f"{self._argument}: was {type(batches).__name__}, wanted {wanted}")

    def __iter__(self) -> Iterator[tuple[float | None, Feeds]]:
        """Yield each batch, and the fraction of the data that it completes; None if that is not known.

        Raises:
            ValueError: There is no batch; or a batch has other names, another rank or shape than the model
                wants, or no examples.
            TypeError: A batch is no array or mapping, or of another dtype.
        """
        number = 0
        for number, (done, feed) in enumerate(self._source(), 1):
            yield done, self._checked(number, feed)
        if not number:
            raise self._none()

    def first(self) -> Feeds:
        """Return the first batch, which is yielded all the same when the data are gone over."""
        source = self._source()
        entry = next(source, None)
        if entry is None:
            raise self._none()
        if not self.again:
            self._source = lambda: chain([entry], source)
        return self._checked(1, entry[1])

    def _none(self) -> ValueError:
        if self.left_out:
            few = f"{self.left_out} examples fill no batch of {self._size}, which the model fixes"
            return ValueError(f"{self._argument}: {few}")
        return ValueError(f"{self._argument}: there is none, wanted one or more")

    def _checked(self, number: int, feed: Any) -> Feeds:
        where = f"{self._argument}: batch {number}"
        if not isinstance(feed, Mapping):
            if not hasattr(feed, "__array__"):
                raise TypeError(f"{where}: was {type(feed).__name__}, wanted an array, or a dict of arrays")
            if len(self._wanted) != 1:
                names = ", ".join(map(repr, self._wanted))
                raise ValueError(f"{where}: was one array, wanted a dict by the inputs of the model: {names}")
            feed = {next(iter(self._wanted)): feed}
        if feed.keys() != self._wanted.keys():
            raise ValueError(f"{where}: names were {sorted(feed)}, wanted {sorted(self._wanted)}")
        checked = {name: np.asarray(values) for name, values in feed.items()}
        for name, array in checked.items():
            self._check(f"{where}: {name!r}", array, name)
        return checked

    def _check(self, where: str, array: NDArray[Any], name: str) -> None:
        element, shape = self._elements[name], self._wanted[name]
        if element and array.dtype != helper.tensor_dtype_to_np_dtype(element):
            wanted = helper.tensor_dtype_to_np_dtype(element)
            raise TypeError(f"{where}: dtype was {array.dtype}, wanted {wanted}")
        if 0 in array.shape[:1]:
            raise ValueError(f"{where}: shape was {array.shape}, wanted one example or more")
        if shape is None:
            return
        fits = all(size is None or size == there for size, there in zip(shape, array.shape, strict=False))
        if len(shape) != array.ndim or not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{where}: shape was {array.shape}, wanted ({sizes})")

    def _cut(self, parts: Iterable[tuple[float, float, Feed, str]]) -> _Rows:
        """Cut data into batches, each part going on where the one before it ended.

        Args:
            parts: Of each part, the fraction of the data before it and in it, itself, and its name in errors.
        """
        kept: list[Feeds] = []  # fewer examples than a batch has, of this part and those before
        rows, done = 0, 0.0
        for before, share, data, where in parts:
            arrays = self._named(data, where)
            length = len(next(iter(arrays.values())))
            start = 0
            while start < length:
                stop = min(length, start + self._size - rows)
                kept.append({name: array[start:stop] for name, array in arrays.items()})
                rows, start = rows + stop - start, stop
                done = before + share * stop / length
                if rows == self._size:
                    yield done, _joined(kept)
                    kept, rows = [], 0
        if self.fixed is not None:
            self.left_out = rows
        elif rows:
            yield done, _joined(kept)

    def _named(self, data: Feed, where: str) -> Feeds:
        """Return the arrays of a part by input name, all of one length."""
        if not isinstance(data, Mapping):
            if len(self._wanted) != 1:
                names = ", ".join(map(repr, self._wanted))
                raise ValueError(f"{where}: was one array, wanted one for each input of the model: {names}")
            data = {next(iter(self._wanted)): data}
        arrays = {name: np.asanyarray(values) for name, values in data.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if arrays.keys() != self._wanted.keys():
            raise ValueError(f"{where}: names were {sorted(arrays)}, wanted {sorted(self._wanted)}")
        if not all(shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
            raise ValueError(f"{where}: shapes were {shapes}, wanted the same number of examples on axis 0")
        return arrays


def _shape_of(entry: Any) -> list[int | None] | None:
    """Return the sizes of the axes of an input, None where a size varies; None if its rank is not known."""
    tensor = entry.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    # It is 0 where there is none; no batch can be cut by a size of 0.
    return [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]


def _batch_size(given: int | None, sizes: set[int]) -> int:
    """Return the number of examples that data are cut into."""
    if given is None:
        return min(sizes, default=_BATCH)
    size = integer("batch_size", given)
    if size < 1:
        raise ValueError(f"batch_size: was {size}, wanted 1 or more")
    if sizes - {size}:
        raise ValueError(f"batch_size: was {size}, wanted {min(sizes)}, which the model fixes")
    return size


def _feeds(batches: Iterable[Feed]) -> _Rows:
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: the callable returned {type(batches).__name__}, wanted an iterable")
    total = len(batches) if isinstance(batches, Sized) else None
    for position, feed in enumerate(batches, 1):
        yield (position / total if total else None), feed


def _all_paths(batches: Iterable[Any]) -> bool:
    return all(isinstance(entry, str | os.PathLike) for entry in batches)


def _files(paths: Iterable[PathLike]) -> list[Path]:
    """Return the files of data, those of a folder by name."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            if path.suffix.lower() not in _SUFFIXES:
                raise ValueError(f"{path}: wanted a name that ends in .npy or .npz")
            files.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not inside:
            raise ValueError(f"{path}: no .npy or .npz in this folder")
        files.extend(inside)
    return files


def _load(path: Path) -> Feed:
    """Return the data of a file: arrays by name of a .npz, one array, mapped into memory, of a .npy."""
    try:
        if path.suffix.lower() == ".npy":
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no array can be read: {error}") from error


def _joined(parts: list[Feeds]) -> Feeds:
    """Return the examples of parts of a batch together."""
    if len(parts) == 1:
        return {name: np.ascontiguousarray(array) for name, array in parts[0].items()}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
