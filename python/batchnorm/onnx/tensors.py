"""Values of the tensors in ONNX models, and the files that hold them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from batchnorm.onnx.nodes import graphs_of

MOST_VALUES = 2**28
"""Of an array that is made from fewer values: a file of a few bytes must not ask for all memory."""
_MOST_DENSE = 2**26  # of such an array that is not one value broadcast


class Place(NamedTuple):
    """Where in which file the data of a tensor are."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Return the data."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


class Tensors:
    """Reads the tensors of a model, of which some may have their data in other files.

    This does not use onnx, which would look for such a file in the working directory if the model has no
    path, and would read the data of all tensors, however large.

    Args:
        where: Name of the model in errors.
        folder: Folder of the model, the only one from which other files are read; None if it has no path.
    """

    def __init__(self, where: str, folder: Path | None) -> None:
        self._where, self._folder = where, folder

    def array(self, tensor: onnx.TensorProto, what: str) -> NDArray[Any]:
        """Return the values of a tensor.

        Args:
            tensor: The tensor.
            what: Its name in errors.

        Raises:
            OSError: Its data are in a file that cannot be read.
            ValueError: Its data are damaged; or they are in another file and the model has no path; or that
                file is outside the folder of the model.
        """
        if is_external(tensor):
            data = self.place(tensor, what).read()
            tensor = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data)
        try:
            return numpy_helper.to_array(tensor)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._where}: {what} is damaged: {error}") from error

    def dense(self, sparse: onnx.SparseTensorProto, what: str) -> NDArray[Any]:
        """Return the values of a sparse tensor as an ordinary array; see `array`."""
        values, indices = self.array(sparse.values, what), self.array(sparse.indices, what)
        try:
            if indices.ndim == 2:
                indices = np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))
            if math.prod(sparse.dims) > _MOST_DENSE:
                raise ValueError(f"shape {tuple(sparse.dims)}, but at most {_MOST_DENSE} values are made")
            dense = np.zeros(tuple(sparse.dims), values.dtype)
            if indices.min(initial=0) < 0:
                raise IndexError("negative index")
            dense.reshape(-1)[indices] = values
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{self._where}: {what} is damaged: {error}") from error
        return dense

    def place(self, tensor: onnx.TensorProto, what: str) -> Place:
        """Return where the data of a tensor in another file are; see `array` for what it raises."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        there = f"{self._where}: the data of {what} are in the file {location!r}"
        if self._folder is None:
            raise ValueError(f"{there}, which was not loaded; give the path of the model")
        try:
            folder = Path(os.path.realpath(self._folder))
            path = Path(os.path.realpath(folder / location))
            inside, is_file = path.is_relative_to(folder), path.is_file()
        except ValueError as error:  # a name with a null byte
            raise ValueError(f"{there}, which is no name of a file: {error}") from error
        if not inside:
            raise ValueError(f"{there}, which is outside the folder of the model and is not read")
        if not is_file:
            raise FileNotFoundError(f"{there}, but there is no such file in the folder of the model")
        size = path.stat().st_size
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size - offset))
        except ValueError as error:
            raise ValueError(f"{there}, but the place in it is damaged: {error}") from error
        if not 0 <= offset <= offset + length <= size:
            raise ValueError(f"{there}, {length} bytes from {offset} on, but it has {size}")
        return Place(path, offset, length)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Return whether the data of a tensor are in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def external_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return all tensors of a model whose data are in other files: of its graphs, nodes and functions."""
    found: list[onnx.TensorProto] = []
    for function in model.functions:
        found.extend(_of_nodes(function.node))
    for graph in graphs_of(model):
        found.extend(graph.initializer)
        found.extend(part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
        found.extend(_of_nodes(graph.node))
    return [tensor for tensor in found if is_external(tensor)]


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
