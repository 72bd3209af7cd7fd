"""The frozen layer in an ONNX model: ours in either mode, or any with one constant BatchNormalization."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper

from batchnorm._file import METADATA_KEYS, check_known, restore
from batchnorm.frozen import FrozenBatchNorm

# Since BatchNormalization-9 the inference form has meant the same; 14 and 15 changed training and the types.
_OLDEST_OPSET = 9
_INPUTS = {"Cast": 1, "Sqrt": 1}  # all others of mode "exact" have 2


def load_frozen(model: onnx.ModelProto | str | os.PathLike[str] | bytes) -> FrozenBatchNorm:
    """The frozen layer of a model written by `FrozenBatchNorm.to_onnx`, in either mode, or by others.

    Of a model that is not ours, the one BatchNormalization node of the main graph is read, if it is in
    inference mode and its parameters are constants; the rest of the model is not looked at. The layer is
    float64 if a parameter is, else float32, which holds 16-bit parameters exactly.

    Args:
        model: the model, its file (which may refer to external data), or its bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such layer, or more than one; or the model is ours, and the parameters are not
            those of its fingerprint.
    """
    model, where = _parse(model)
    graph = _Graph(model, where)
    found = {prop.key: prop.value for prop in model.metadata_props if prop.key in METADATA_KEYS}
    if "fingerprint" not in found:
        parameters, eps = graph.inference()
        wide = any(values.dtype == np.float64 for values in parameters.values())
        return FrozenBatchNorm(**_float64(parameters), eps=eps, dtype="float64" if wide else "float32")
    check_known(where, found)
    parameters, eps = graph.inference() if graph.normalizations else graph.exact()
    return restore(FrozenBatchNorm, where, found, _float64(parameters), eps)


def _parse(model: onnx.ModelProto | str | os.PathLike[str] | bytes) -> tuple[onnx.ModelProto, str]:
    if isinstance(model, onnx.ModelProto):
        return model, "model"
    where = "model" if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model), where
    except DecodeError as error:
        raise ValueError(f"{where}: not an ONNX model: {error}") from error


def _float64(parameters: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: values.astype(np.float64) for name, values in parameters.items()}


class _Graph:
    """The main graph of a model, and how to find parameters in it."""

    def __init__(self, model: onnx.ModelProto, where: str) -> None:
        self.where = where
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
        self.graph = model.graph
        self.producer = {output: node for node in model.graph.node for output in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer} | {
            node.output[0]: attribute.t
            for node in model.graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.normalizations = [node for node in model.graph.node if node.op_type == "BatchNormalization"]

    def inference(self) -> tuple[dict[str, NDArray[Any]], float]:
        """gamma, beta, mean, var and eps of the one BatchNormalization."""
        if len(self.normalizations) != 1:
            operators = Counter(node.op_type for node in self.graph.node)
            there = ", ".join(f"{count} {op}" for op, count in operators.items()) or "no nodes"
            raise ValueError(f"{self.where}: one BatchNormalization is wanted, found {there}")
        (node,) = self.normalizations
        if self.opset < _OLDEST_OPSET:
            raise ValueError(f"{self.where}: opset {_OLDEST_OPSET} or newer is wanted, found {self.opset}")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("training_mode", 0) or any(node.output[1:]):
            raise ValueError(f"{self.where}: BatchNormalization for inference wanted, found training mode")
        if len(node.input) != 5:
            raise ValueError(f"{self.where}: BatchNormalization of 5 inputs wanted, found {len(node.input)}")
        names = zip(("gamma", "beta", "mean", "var"), node.input[1:], strict=True)
        parameters = {ours: self._constant(ours, name) for ours, name in names}
        return parameters, attributes.get("epsilon", float(np.float32(1e-5)))

    def exact(self) -> tuple[dict[str, NDArray[Any]], float]:
        """The same from mode "exact": (x − mean)·(gamma/√(var + eps)) + beta, x and y perhaps cast."""
        y = next((output.name for output in self.graph.output), "")
        if self._producer_is("Cast", y):
            (y,) = self._inputs_of("Cast", y)
        scaled, beta = self._inputs_of("Add", y)
        centred, scale = self._inputs_of("Mul", scaled)
        x, mean = self._inputs_of("Sub", centred)
        gamma, sigma = self._inputs_of("Div", scale)
        (var_eps,) = self._inputs_of("Sqrt", sigma)
        var, eps = self._inputs_of("Add", var_eps)
        if self._producer_is("Cast", x):
            (x,) = self._inputs_of("Cast", x)
        inputs = [entry.name for entry in self.graph.input]
        if inputs != [x]:
            raise ValueError(f"{self.where}: not mode 'exact': {x!r} is normalized, but inputs are {inputs}")
        names = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
        parameters = {ours: self._constant(ours, name).ravel() for ours, name in names.items()}
        return parameters, float(self._constant("eps", eps))

    def _producer_is(self, op: str, name: str) -> bool:
        return name in self.producer and self.producer[name].op_type == op

    def _inputs_of(self, op: str, name: str) -> list[str]:
        if not self._producer_is(op, name):
            found = self.producer[name].op_type if name in self.producer else "none"
            raise ValueError(f"{self.where}: not mode 'exact': {name!r} by a node {op} wanted, found {found}")
        inputs, wanted = list(self.producer[name].input), _INPUTS.get(op, 2)
        if len(inputs) != wanted:
            raise ValueError(
                f"{self.where}: not mode 'exact': {op} of {wanted} inputs wanted, found {len(inputs)}"
            )
        return inputs

    def _constant(self, ours: str, name: str) -> NDArray[Any]:
        if name not in self.constants:
            source = f"computed by {self.producer[name].op_type}" if name in self.producer else "an input"
            raise ValueError(f"{self.where}: {ours} ({name!r}) is {source}, but a constant is wanted")
        return numpy_helper.to_array(self.constants[name])
