"""The operators of ONNX whose results are read as constants where their inputs are constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from batchnorm.onnx.nodes import attributes_of
from batchnorm.onnx.tensors import MOST_VALUES, Tensors

Array = NDArray[Any]

_CAST_TO = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16,
            TensorProto.INT32, TensorProto.INT64)  # fmt: skip
_CONSTANT_DTYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}
_MOST_AXES = 64  # of an array of NumPy


def evaluate(node: onnx.NodeProto, inputs: list[Array], tensors: Tensors, where: str, what: str) -> Array:
    """Return the output of a node of one of the `OPERATORS`, or raise ValueError saying what hinders it.

    Args:
        node: The node.
        inputs: The values of its inputs.
        tensors: Reads its attributes.
        where: Name of the model in errors.
        what: Name of the value in errors.
    """
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Constant":
        return _constant(attributes, tensors, where, what)
    try:
        if node.op_type == "ConstantOfShape":
            values = np.zeros(1, np.float32)
            if "value" in attributes:
                values = tensors.array(attributes["value"].t, what)
            return np.broadcast_to(values.reshape(()), _shape(inputs[0]))
        return _OPERATORS[node.op_type](inputs, attributes_of(node))
    except (KeyError, IndexError, OverflowError, TypeError, ValueError) as error:
        message = str(error).removeprefix(f"{where}: ")
        raise ValueError(f"{where}: {what}: {node.op_type} cannot be evaluated: {message}") from error


def _constant(attributes: dict[str, onnx.AttributeProto], tensors: Tensors, where: str, what: str) -> Array:
    if "value" in attributes:
        return tensors.array(attributes["value"].t, what)
    if "sparse_value" in attributes:
        return tensors.dense(attributes["sparse_value"].sparse_tensor, what)
    for name, dtype in _CONSTANT_DTYPES.items():
        if name in attributes:
            try:
                return np.array(helper.get_attribute_value(attributes[name]), dtype)
            except (OverflowError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: {what} is a Constant whose {name} is damaged: {error}") from error
    found = ", ".join(map(str, attributes)) or "no value"
    raise ValueError(f"{where}: {what} is a Constant with {found}, but numbers are wanted")


def _identity(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    return inputs[0]


def _cast(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    if attributes["to"] not in _CAST_TO:
        wanted = ", ".join(map(str, _CAST_TO))
        raise ValueError(f"to={attributes['to']} is none of the types {wanted}")
    return _as_type(inputs[0], helper.tensor_dtype_to_np_dtype(attributes["to"]))


def _cast_like(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    return _as_type(inputs[0], inputs[1].dtype)


@np.errstate(all="ignore")
def _as_type(values: Array, dtype: np.dtype[Any]) -> Array:
    if _is_one_value(values):
        return np.broadcast_to(values.flat[0].astype(dtype), values.shape)
    return values.astype(dtype)


def _is_one_value(values: Array) -> bool:
    """Return whether an array is one value broadcast, of which no copy in full is made."""
    return values.size > 1 and not any(values.strides)


def _reshape(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    keep_zeros = attributes.get("allowzero", 0) != 0
    sizes = enumerate(inputs[1].tolist())
    return inputs[0].reshape([size if size or keep_zeros else inputs[0].shape[axis] for axis, size in sizes])


def _expand(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    return np.broadcast_to(
        inputs[0], _shape(np.array(np.broadcast_shapes(inputs[0].shape, _shape(inputs[1]))))
    )


def _unsqueeze(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    axes = attributes["axes"] if "axes" in attributes else inputs[1].tolist()
    return np.expand_dims(inputs[0], tuple(axes))


def _shape(sizes: Array) -> tuple[int, ...]:
    """Return the shape that a tensor holds, or raise ValueError if no array of it is made."""
    if sizes.ndim != 1 or sizes.size > _MOST_AXES or sizes.dtype.kind not in "iu":
        raise ValueError(f"a shape was {sizes.dtype} of shape {sizes.shape}, wanted a list of integers")
    shape = tuple(sizes.tolist())
    if min(shape, default=0) < 0 or math.prod(shape) > MOST_VALUES:
        raise ValueError(f"shape {shape} wanted, but at most {MOST_VALUES} values are made")
    return shape


def _transpose(inputs: list[Array], attributes: dict[str, Any]) -> Array:
    return np.transpose(inputs[0], attributes.get("perm"))


_OPERATORS: dict[str, Callable[[list[Array], dict[str, Any]], Array]] = {
    "Identity": _identity,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Reshape": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

OPERATORS = ("Constant", "ConstantOfShape", "Shape", *_OPERATORS)
"""Operators of constants. `evaluate` knows all but Shape, for which the graph must be known."""
