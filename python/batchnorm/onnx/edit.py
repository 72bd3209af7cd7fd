"""Changes of an ONNX model, which are made in a copy, and the files that it is saved to."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from batchnorm._atomic import replacing
from batchnorm._checks import channels_where
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.nodes import graphs_of, values_used
from batchnorm.onnx.tensors import external_tensors, is_external

_LARGEST_MODEL = 2**31 - 1  # bytes of one message of protobuf
_MOVED_FROM = 1024  # bytes of a tensor; smaller ones stay in the model's file, as onnx.save leaves them
_ALIGNMENT = 4096  # of a tensor in a data file, so that runtimes can map it into memory
_INPUTS_BEFORE_IR = 4  # in which an initializer need no longer be an input of the graph


class Editor:
    """A copy of a model that is changed and then taken by `finish`; the model itself stays as it is.

    Args:
        graph: The model.

    Attributes:
        model: The copy.
        graph: Access to the copy; `refresh` makes it anew after nodes have changed.
    """

    def __init__(self, graph: Graph) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(graph.model)
        self._source = graph
        self._taken: set[str] | None = None
        self.graph = Graph(self.model, like=graph)

    def refresh(self) -> None:
        """Look at the copy again, after nodes or initializers were added, removed or connected otherwise."""
        self.graph = Graph(self.model, like=self._source)

    def new_name(self, wanted: str) -> str:
        """Return a name that no value of the model has: `wanted`, or that with a number behind it."""
        if self._taken is None:
            self._taken = _names(self.model)
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name

    def add_initializer(self, wanted: str, values: NDArray[Any]) -> str:
        """Add a constant, under `wanted` or a name like it, and return its name."""
        name = self.new_name(wanted)
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.model.graph.initializer.append(tensor)
        if self.model.ir_version < _INPUTS_BEFORE_IR:
            entry = helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            self.model.graph.input.append(entry)
        return name

    def write(self, node: onnx.NodeProto, position: int, values: NDArray[Any], key: str) -> None:
        """Make `values` the constant that a node of the copy reads as its input at `position`.

        An initializer of the same type and shape that is read here only is changed in place. Otherwise the
        node gets a new one, named after the old value and `key`.
        """
        name = node.input[position]
        old = self.graph.initializers.get(name)
        alone = self.graph.consumers.get(name) == [node] and list(node.input).count(name) == 1
        if isinstance(old, TensorProto) and alone and name not in self.graph.outputs:
            new = numpy_helper.from_array(np.ascontiguousarray(values), name)
            if (new.data_type, list(new.dims)) == (old.data_type, list(old.dims)):
                _embed(old, new.raw_data)
                return
        node.input[position] = self.add_initializer(f"{name}/{key}", values)

    def remove_unused(self, names: set[str]) -> None:
        """Remove those of the named initializers, and nodes without other use, that nothing reads any more.

        What they were computed from goes with them, and what the model says of the types of values that it
        no longer has. Call it after nodes have been removed or connected anew.
        """
        self.refresh()
        uses = Counter({name: len(nodes) for name, nodes in self.graph.consumers.items()})
        uses.update(self.graph.outputs)
        removed: set[str] = set()
        pending = [*names]
        while pending:
            name = pending.pop()
            if uses[name] or name in removed:
                continue
            if (node := self.graph.producer.get(name)) is not None:
                if any(uses[output] for output in node.output):
                    continue
                removed.update(filter(None, node.output))
                for used in values_used(node):
                    uses[used] -= 1
                    pending.append(used)
            elif name in self.graph.initializers and name not in self.graph.overridable:
                removed.add(name)
        graph = self.model.graph
        remove(graph.node, lambda node: not removed.isdisjoint(node.output))
        remove(graph.initializer, lambda tensor: tensor.name in removed)
        remove(graph.sparse_initializer, lambda sparse: sparse.values.name in removed)
        remove(graph.input, lambda entry: entry.name in removed)
        self.refresh()
        left = {*self.graph.producer, *self.graph.initializers}
        gone = {*self._source.producer, *self._source.initializers} - left
        remove(graph.value_info, lambda entry: entry.name in gone)
        remove(graph.quantization_annotation, lambda entry: entry.tensor_name in gone)

    def finish(self, out: str | os.PathLike[str] | None = None) -> onnx.ModelProto:
        """Return the changed model, and save it to `out` if that is given.

        Args:
            out: A file to write, whole or not at all. If the model has tensors in other files, they are
                copied to one file beside it, `<out>.data`, to which the result refers; if the model itself
                has tensors in a file of that name, a number is added. Without `out` they become part of the
                result.

        Raises:
            OSError: A file cannot be read or written.
            ValueError: Without `out`: the result is too large for one message of protobuf (2 GB).
        """
        if out is not None:
            self._save(Path(out))
            return self.model
        tensors = external_tensors(self.model)
        places = [self.graph.tensors.place(tensor, repr(tensor.name)) for tensor in tensors]
        size = sum(place.length for place in places) + self.model.ByteSize()
        if size > _LARGEST_MODEL:
            limit = f"at most {_LARGEST_MODEL} are possible in one message; give out="
            raise ValueError(f"{self.graph.where}: the result has {size} bytes, but {limit}")
        for tensor, place in zip(tensors, places, strict=True):
            _embed(tensor, place.read())
        return self.model

    def _save(self, out: Path) -> None:
        external = external_tensors(self.model)
        if not external:
            with replacing(out) as file:
                file.write(self.model.SerializeToString())
            return
        found = [(tensor, self.graph.tensors.place(tensor, repr(tensor.name))) for tensor in external]
        source_files = external_tensors(self._source.model)
        read_from = {self._source.tensors.place(tensor, repr(tensor.name)).path for tensor in source_files}
        data, number = out.with_name(f"{out.name}.data"), 2
        while data.resolve() in read_from:  # the model, or a copy of it by another name, would be destroyed
            data, number = out.with_name(f"{out.name}.{number}.data"), number + 1
        # Written before any change of the model, since out may be the model's own file.
        places: list[tuple[onnx.TensorProto, int, int]] = []
        with replacing(data) as file:
            for tensor, place in found:
                places.append((tensor, _aligned(file), place.length))
                with place.path.open("rb") as source:
                    source.seek(place.offset)
                    _copy(source, file, place.length)
            for tensor in (t for graph in graphs_of(self.model) for t in graph.initializer):
                if not is_external(tensor) and len(tensor.raw_data) >= _MOVED_FROM:
                    places.append((tensor, _aligned(file), len(tensor.raw_data)))
                    file.write(tensor.raw_data)
        for tensor, offset, length in places:
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
        with replacing(out) as file:
            file.write(self.model.SerializeToString())


def remove(entries: Any, unwanted: Callable[[Any], bool]) -> None:
    """Remove the entries of a repeated field of a message that are unwanted.

    The field's own `remove` compares messages, with all the data in them.
    """
    for position in reversed(range(len(entries))):
        if unwanted(entries[position]):
            del entries[position]


def narrowed(role: str, values: NDArray[np.float64], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """Round values to the type that a model stores them in.

    Raises:
        ValueError: One becomes infinite; or it is a positive variance and becomes 0.
    """
    with np.errstate(all="ignore"):
        rounded = values.astype(dtype)
        wide = rounded.astype(np.float64)
    if bad := channels_where(~np.isfinite(wide)):
        raise ValueError(f"{where}: {role} is beyond {dtype.name}, in which the model holds it, in {bad}")
    if role == "var" and (bad := channels_where((wide == 0) & (values > 0))):
        raise ValueError(f"{where}: var is positive, but 0 in {dtype.name}, the model's type, in {bad}")
    return rounded


def _embed(tensor: onnx.TensorProto, data: bytes) -> None:
    """Make `data` the values of a tensor, in place of those that it has."""
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data"):
        tensor.ClearField(field)
    tensor.ClearField("data_location")
    tensor.raw_data = data


def _names(model: onnx.ModelProto) -> set[str]:
    names: set[str] = set()
    for graph in graphs_of(model):
        for node in graph.node:
            names.update(node.input, node.output)
        names.update(tensor.name for tensor in graph.initializer)
        names.update(sparse.values.name for sparse in graph.sparse_initializer)
        names.update(entry.name for entry in (*graph.input, *graph.output, *graph.value_info))
    return names


def _aligned(file: IO[bytes]) -> int:
    """Write zeros up to the next place where a tensor may begin, and return that place."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    return file.tell()


def _copy(source: IO[bytes], target: IO[bytes], length: int) -> None:
    while length:
        chunk = source.read(min(length, shutil.COPY_BUFSIZE))  # type: ignore[attr-defined]
        if not chunk:
            raise OSError("a file with data of the model became shorter while it was read")
        target.write(chunk)
        length -= len(chunk)
