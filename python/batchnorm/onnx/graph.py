"""Access to an ONNX model: what computes and reads the values of its main graph, and constants."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import helper

from batchnorm.onnx.constants import OPERATORS, evaluate
from batchnorm.onnx.nodes import attributes_of, is_standard, names_of, operator_name, opset_of, values_used
from batchnorm.onnx.tensors import Tensors

ModelSource: TypeAlias = onnx.ModelProto | str | os.PathLike[str] | bytes
"""A model, its file, or its bytes."""

_FEWEST_INPUTS = {"Shape": 1, "CastLike": 2}  # that are looked at here, not in `evaluate`
_LONGEST_FOLLOWED = 2**16  # entries of a vector
_OVERRIDABLE_FROM_IR = 4  # before it, every initializer had to be an input too


class Graph:
    """The main graph of a model. It does not follow changes of the model: make another `Graph` after them.

    Args:
        model: The model, its file, or its bytes.
        like: The graph of the model that this one was copied from, whose name and folder it takes.

    Attributes:
        where: Name of the model in errors: its path, or "model".
        folder: The folder of the model's file, where tensors may have their data; None if it has no path.
        model: The model. Tensor data in other files are read only when they are asked for.
        opset: The version of ONNX's own operators.
        producer: The node that computes a value, by the name of the value.
        tensors: Reads the tensors of the model.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not an ONNX model, or two nodes compute the same value.
    """

    where: str
    folder: Path | None

    def __init__(self, model: ModelSource, *, like: Graph | None = None) -> None:
        self.where, self.folder = (like.where, like.folder) if like else ("model", None)
        if not isinstance(model, (onnx.ModelProto, bytes)):
            self.where, self.folder = os.fspath(model), Path(model).parent
        self.model = _parse(model, self.where)
        # Of a copy it is known, and copies are looked at after each change.
        damaged = None if like else next((n for n in names_of(self.model) if isinstance(n, bytes)), None)
        if damaged is not None:
            raise ValueError(f"{self.where}: not an ONNX model: {damaged!r} is not UTF-8")
        self.tensors = Tensors(self.where, self.folder)
        self.opset = opset_of(self.model.opset_import)
        self.producer: dict[str, onnx.NodeProto] = {}
        self._position: dict[str, int] = {}
        for position, node in enumerate(self.model.graph.node):
            for output in filter(None, node.output):
                if output in self.producer:
                    raise ValueError(f"{self.where}: {output!r} is computed twice")
                self.producer[output], self._position[output] = node, position

    def nodes(self, *operators: str) -> list[onnx.NodeProto]:
        """Return the nodes of these operators of ONNX's own domain, in order."""
        return [node for node in self.model.graph.node if is_standard(node, *operators)]

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto | onnx.SparseTensorProto]:
        """The initializers by name."""
        graph = self.model.graph
        return {
            **{tensor.name: tensor for tensor in graph.initializer},
            **{sparse.values.name: sparse for sparse in graph.sparse_initializer},
        }

    @cached_property
    def inputs(self) -> dict[str, onnx.ValueInfoProto]:
        """The inputs that a caller must give, by name: those without an initializer."""
        named = {entry.name: entry for entry in self.model.graph.input}
        return {name: entry for name, entry in named.items() if name not in self.initializers}

    @cached_property
    def outputs(self) -> list[str]:
        """The names of the outputs."""
        return [entry.name for entry in self.model.graph.output]

    @cached_property
    def overridable(self) -> set[str]:
        """The initializers that are inputs too, for which a caller may give other values (from IR 4 on)."""
        if self.model.ir_version < _OVERRIDABLE_FROM_IR:
            return set()
        return {entry.name for entry in self.model.graph.input} & self.initializers.keys()

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read a value, in order, by its name; a node counts if a subgraph of it reads it.

        Outputs of the graph are no nodes: see `outputs`. A value that nothing reads has no entry.
        """
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in values_used(node):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def shapes(self) -> dict[str, list[int | None]]:
        """The sizes of axes by value, None where a size varies; values of unknown rank have no entry.

        They are inferred by onnx; of a model in which it finds a contradiction, none are known.
        """
        return {
            # Some exporters write -1 where a size varies.
            name: [
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None
                for dim in kind.shape.dim
            ]
            for name, kind in self._types.items()
            if kind.HasField("shape")
        }

    @cached_property
    def elements(self) -> dict[str, np.dtype[Any]]:
        """The types of tensors by value, as far as they are known."""
        return {
            name: helper.tensor_dtype_to_np_dtype(kind.elem_type)
            for name, kind in self._types.items()
            if kind.elem_type in helper.get_all_tensor_dtypes()
        }

    @cached_property
    def _types(self) -> dict[str, onnx.TypeProto.Tensor]:
        own = {
            name: helper.make_tensor_type_proto(
                (tensor if isinstance(tensor, onnx.TensorProto) else tensor.values).data_type, tensor.dims
            ).tensor_type
            for name, tensor in self.initializers.items()
        }
        try:
            found = _inferred(self.model) | own
            # To follow the values of shapes, onnx makes an object for each entry of the vectors that it
            # comes across, whatever they hold: some hundred bytes each, and for as long as the model says.
            if all(
                len(t.shape.dim) != 1 or t.shape.dim[0].dim_value < _LONGEST_FOLLOWED for t in found.values()
            ):
                found = _inferred(self.model, data_prop=True) | own
        except (onnx.shape_inference.InferenceError, ValueError, TypeError, RuntimeError):
            return {}
        return found

    def constant(self, role: str, name: str) -> NDArray[Any]:
        """Return the constant `name`: an initializer, or a value computed from constants by simple operators.

        The operators are every form of Constant, ConstantOfShape, Identity, Cast, CastLike, Expand, Reshape,
        Transpose and Unsqueeze, and Shape of any value whose sizes are fixed. The array may be read-only, or
        one number broadcast to a shape.

        Args:
            role: Name of the value in errors.
            name: The name of the value in the graph.

        Raises:
            OSError: Its data are in a file that cannot be read.
            ValueError: It is not constant; or its data are damaged; or they are in another file and the model
                was not given by its path; or that file is outside the folder of the model.
        """
        values: dict[str, NDArray[Any]] = {}
        needed = self.sources(role, name)
        for value in needed & self.initializers.keys():
            tensor, what = self.initializers[value], f"{role} ({value!r})"
            read = self.tensors.array if isinstance(tensor, onnx.TensorProto) else self.tensors.dense
            values[value] = read(tensor, what)
        # Nodes are sorted: the inputs of a node are computed before it.
        for value in sorted(needed - values.keys(), key=self._position.__getitem__):
            node = self.producer[value]
            if len(node.input) < _FEWEST_INPUTS.get(node.op_type, 0):
                raise ValueError(f"{self.where}: {role}: {node.op_type} has {len(node.input)} inputs")
            try:
                inputs = [values[used] for used in _read_by(node)]
            except KeyError as error:
                raise ValueError(f"{self.where}: {role}: {error} is used before it is computed") from error
            if node.op_type == "Shape":
                values[value] = self._sizes(node, role)
                continue
            if node.op_type == "CastLike":
                inputs.append(np.empty(0, self._element(next(iter(node.input[1:]), ""), role)))
            values[value] = evaluate(node, inputs, self.tensors, self.where, f"{role} ({value!r})")
        return values[name]

    def sources(self, role: str, name: str) -> set[str]:
        """Return the names of all values from which the constant `name` is computed, and its own.

        Raises:
            ValueError: It is not constant.
        """
        needed: set[str] = set()
        pending = [name]
        while pending:
            value = pending.pop()
            if value in needed:
                continue
            needed.add(value)
            if value in self.initializers:
                continue
            node = self.producer.get(value)
            if node is None or not is_standard(node, *OPERATORS):
                source = "an input" if node is None else f"computed by {operator_name(node)}"
                raise ValueError(f"{self.where}: {role} ({value!r}) is {source}, but a constant is wanted")
            pending.extend(_read_by(node))
        return needed

    def _sizes(self, node: onnx.NodeProto, role: str) -> NDArray[Any]:
        """Return the output of a Shape."""
        name, attributes = next(iter(node.input), ""), attributes_of(node)
        start, end = attributes.get("start", 0), attributes.get("end")
        if not isinstance(start, int) or not isinstance(end, int | None):
            raise ValueError(f"{self.where}: {role} is made by a Shape from {start!r} to {end!r}")
        shape = self.shapes.get(name)
        sizes = None if shape is None else shape[start:end]
        if sizes is None or None in sizes:
            found = "rank varies" if sizes is None else "sizes vary"
            raise ValueError(f"{self.where}: {role} is made by the Shape of {name!r}, whose {found}")
        return np.array(sizes, np.int64)

    def _element(self, name: str, role: str) -> np.dtype[Any]:
        if name not in self.elements:
            raise ValueError(f"{self.where}: {role} is cast to the type of {name!r}, which is not known")
        return self.elements[name]


def _read_by(node: onnx.NodeProto) -> list[str]:
    """Return the inputs whose values a constant depends on, and not on their shape or type alone."""
    return [*node.input[: {"Shape": 0, "CastLike": 1}.get(node.op_type)]]


def _inferred(model: onnx.ModelProto, *, data_prop: bool = False) -> dict[str, onnx.TypeProto.Tensor]:
    """Return the types that onnx infers, by value."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=data_prop).graph
    entries = (*graph.input, *graph.output, *graph.value_info)
    return {entry.name: entry.type.tensor_type for entry in entries if entry.type.HasField("tensor_type")}


def _parse(model: ModelSource, where: str) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        parsed = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ValueError(f"{where}: not an ONNX model: {error}") from error
    if parsed.ir_version < 1 or not parsed.HasField("graph"):  # any short file may be read as a message
        raise ValueError(f"{where}: not an ONNX model: it has no IR version or no graph")
    return parsed
