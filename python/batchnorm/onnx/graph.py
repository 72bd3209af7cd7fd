"""Access to the main graph of an ONNX model: the node that computes a value, and the values of constants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_STANDARD_DOMAINS = ("", "ai.onnx")  # two names of ONNX's own domain
_FOLDED = ("Constant", "Identity", "Cast", "Reshape")
_CAST_TO: dict[int, type[np.number[Any]]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
}
_CONSTANT_DTYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


class Graph:
    """The main graph of a model.

    Args:
        model: The model, its file, or its bytes.

    Attributes:
        where: Name of the model in errors: its path, or "model".
        model: The model. Tensor data in other files are read only when they are asked for.
        opset: The version of ONNX's own operators.
        producer: The node that computes a value, by the name of the value.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not an ONNX model.
    """

    where: str
    _folder: Path | None

    def __init__(self, model: onnx.ModelProto | str | os.PathLike[str] | bytes) -> None:
        self.where, self._folder = "model", None
        if not isinstance(model, (onnx.ModelProto, bytes)):
            self.where, self._folder = os.fspath(model), Path(model).parent
        self.model = _parse(model, self.where)
        versions = [entry.version for entry in self.model.opset_import if entry.domain in _STANDARD_DOMAINS]
        self.opset = max(versions, default=0)
        self.producer = {output: node for node in self.model.graph.node for output in node.output}
        graph = self.model.graph
        self._initializers: dict[str, onnx.TensorProto | onnx.SparseTensorProto] = {
            **{tensor.name: tensor for tensor in graph.initializer},
            **{sparse.values.name: sparse for sparse in graph.sparse_initializer},
        }

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        """Return the nodes of an operator of ONNX's own domain, in order."""
        return [node for node in self.model.graph.node if is_standard(node, operator)]

    def constant(self, role: str, name: str) -> NDArray[Any]:
        """Return the constant `name`: an initializer, or a value computed from constants by simple operators.

        The operators are every form of Constant, and Identity, Cast and Reshape.

        Args:
            role: Name of the value in errors.
            name: The name of the value in the graph.

        Raises:
            OSError: Its data are in a file that cannot be read.
            ValueError: It is not constant; or its data are damaged; or they are in another file and the model
                was not given by its path; or that file is outside the folder of the model.
        """
        values: dict[str, NDArray[Any]] = {}
        needed = self._needed(role, name)
        for value in needed & self._initializers.keys():
            values[value] = self._initial(self._initializers[value], f"{role} ({value!r})")
        for node in self.model.graph.node:  # nodes are sorted: the inputs of a node are computed before it
            if needed.isdisjoint(node.output):
                continue
            try:
                inputs = [values[value] for value in node.input]
            except KeyError as error:
                raise ValueError(f"{self.where}: {role}: {error} is used before it is computed") from error
            values[node.output[0]] = self._fold(node, inputs, f"{role} ({node.output[0]!r})")
        return values[name]

    def _needed(self, role: str, name: str) -> set[str]:
        """Return the names of all values from which the value `name` is computed."""
        needed: set[str] = set()
        pending = [name]
        while pending:
            value = pending.pop()
            if value in needed:
                continue
            needed.add(value)
            if value in self._initializers:
                continue
            node = self.producer.get(value)
            if node is None or not any(is_standard(node, operator) for operator in _FOLDED):
                source = "an input" if node is None else f"computed by {operator_name(node)}"
                raise ValueError(f"{self.where}: {role} ({value!r}) is {source}, but a constant is wanted")
            pending.extend(node.input)
        return needed

    def _fold(self, node: onnx.NodeProto, inputs: list[NDArray[Any]], what: str) -> NDArray[Any]:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant":
            return self._of_constant(attributes, what)
        try:
            if node.op_type == "Identity":
                return inputs[0]
            if node.op_type == "Cast":
                with np.errstate(all="ignore"):
                    return inputs[0].astype(_cast_type(attributes["to"].i))
            keep_zeros = "allowzero" in attributes and attributes["allowzero"].i != 0
            sizes = enumerate(inputs[1].tolist())
            shape = [size if size or keep_zeros else inputs[0].shape[axis] for axis, size in sizes]
            return inputs[0].reshape(shape)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{self.where}: {what}: {node.op_type} cannot be evaluated: {error}") from error

    def _of_constant(self, attributes: dict[str, onnx.AttributeProto], what: str) -> NDArray[Any]:
        if "value" in attributes:
            return self._array(attributes["value"].t, what)
        if "sparse_value" in attributes:
            return self._dense(attributes["sparse_value"].sparse_tensor, what)
        for name, dtype in _CONSTANT_DTYPES.items():
            if name in attributes:
                return np.array(helper.get_attribute_value(attributes[name]), dtype)
        found = ", ".join(attributes) or "no value"
        raise ValueError(f"{self.where}: {what} is a Constant with {found}, but numbers are wanted")

    def _initial(self, tensor: onnx.TensorProto | onnx.SparseTensorProto, what: str) -> NDArray[Any]:
        if isinstance(tensor, onnx.TensorProto):
            return self._array(tensor, what)
        return self._dense(tensor, what)

    def _dense(self, sparse: onnx.SparseTensorProto, what: str) -> NDArray[Any]:
        values, indices = self._array(sparse.values, what), self._array(sparse.indices, what)
        try:
            if indices.ndim == 2:
                indices = np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))
            dense = np.zeros(tuple(sparse.dims), values.dtype)
            if indices.min(initial=0) < 0:
                raise IndexError("negative index")
            dense.reshape(-1)[indices] = values
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{self.where}: {what} is damaged: {error}") from error
        return dense

    def _array(self, tensor: onnx.TensorProto, what: str) -> NDArray[Any]:
        if tensor.data_location == TensorProto.EXTERNAL:
            data = self._external_data(tensor, what)
            tensor = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data)
        try:
            return numpy_helper.to_array(tensor)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.where}: {what} is damaged: {error}") from error

    def _external_data(self, tensor: onnx.TensorProto, what: str) -> bytes:
        """Return the data of a tensor that are in another file beside the model.

        This does not use onnx, which would look for the file in the working directory if the model has no
        path, and would read the data of all tensors, however large.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        there = f"{self.where}: the data of {what} are in the file {location!r}"
        if self._folder is None:
            raise ValueError(f"{there}, which was not loaded; give the path of the model")
        folder = Path(os.path.realpath(self._folder))
        path = Path(os.path.realpath(folder / location))
        if not path.is_relative_to(folder):
            raise ValueError(f"{there}, which is outside the folder of the model and is not read")
        if not path.is_file():
            raise FileNotFoundError(f"{there}, but there is no such file in the folder of the model")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                offset = int(entries.get("offset", 0))
                length = int(entries.get("length", size - offset))
            except ValueError as error:
                raise ValueError(f"{there}, but the place in it is damaged: {error}") from error
            if not 0 <= offset <= offset + length <= size:
                raise ValueError(f"{there}, {length} bytes from {offset} on, but it has {size}")
            file.seek(offset)
            return file.read(length)


def _parse(model: onnx.ModelProto | str | os.PathLike[str] | bytes, where: str) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_model_from_string(model)
        return onnx.load(model, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{where}: not an ONNX model: {error}") from error


def _cast_type(to: int) -> type[np.number[Any]]:
    if to not in _CAST_TO:
        raise ValueError(f"to={to} is none of the types {', '.join(map(str, _CAST_TO))}")
    return _CAST_TO[to]


def is_standard(node: onnx.NodeProto, operator: str) -> bool:
    """Return whether a node is the given operator of ONNX's own domain, since other domains share names."""
    return node.op_type == operator and node.domain in _STANDARD_DOMAINS


def operator_name(node: onnx.NodeProto) -> str:
    """Return the operator of a node, with its domain if that is not ONNX's own."""
    return node.op_type if node.domain in _STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"
