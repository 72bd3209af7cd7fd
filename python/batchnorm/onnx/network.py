"""Export of a sequence of layers as one ONNX model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm._checks import integer
from batchnorm._core import real_array
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.layer import BatchNorm
from batchnorm.onnx.edit import narrowed
from batchnorm.onnx.export import OLDEST_OPSET, add_layer, node_properties
from batchnorm.onnx.model import Block, Value, assemble, axis_of, checked_opset, dynamic, tensor_dtype


class Linear(NamedTuple):
    """A dense layer over the last axis of x: y_o = Σ_i weight[o, i]·x_i + bias_o.

    Attributes:
        weight: Shape (outputs, inputs).
        bias: Shape (outputs,); None for none.
    """

    weight: ArrayLike
    bias: ArrayLike | None = None


class Conv(NamedTuple):
    """A convolution of x of shape (N, C, …), with as many spatial axes as the weight has.

    Attributes:
        weight: Shape (outputs, inputs / groups, …).
        bias: Shape (outputs,); None for none.
        stride: Step along every spatial axis, or one for each.
        padding: Number of zeros on both sides of every spatial axis, or one number for each.
        groups: Number of groups of channels that are convolved separately.
        dilation: Distance of the points of the kernel along every spatial axis, or one for each.
    """

    weight: ArrayLike
    bias: ArrayLike | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    groups: int = 1
    dilation: int | Sequence[int] = 1


class Activation(NamedTuple):
    """A function of each element: "relu", "relu6" (ReLU of at most 6) or "sigmoid"."""

    function: Literal["relu", "relu6", "sigmoid"]


class Fused(NamedTuple):
    """A batch norm with what `BatchNorm` computes in the same pass: y = activation(BN(x) + residual).

    Attributes:
        layer: The batch norm.
        activation: None, "relu" or "relu6".
        residual: Name of the layer before, or of the input, whose result is added; None for none.
    """

    layer: FrozenBatchNorm | BatchNorm
    activation: Literal["relu", "relu6"] | None = None
    residual: str | None = None


Layer: TypeAlias = Linear | Conv | Activation | Fused | FrozenBatchNorm | BatchNorm
"""A layer of a network."""


def export_network(
    layers: Sequence[Layer] | Mapping[str, Layer],
    shape: Sequence[int | str | None],
    *,
    opset: int = 15,
    dtype: DTypeLike = "float32",
    x: str = "x",
    y: str = "y",
) -> onnx.ModelProto:
    """Make one ONNX model of layers in a row.

    A batch norm becomes one BatchNormalization, which `frozen_layers` reads back, and what else is fused with
    it nodes of their own. A `Linear` becomes a Gemm if it has a bias and x has two axes, else a MatMul and an
    Add. The names of the nodes and values of a layer begin with that of the layer.

    Args:
        layers: The layers, by name or in a row; without names they are named after what they are and their
            place: `linear_0`, `conv_1`, `batchnorm_2`, `relu_3`.
        shape: Sizes of x's axes: an integer is fixed, a name or None is dynamic.
        opset: Version of the ONNX operators, from 9 to the newest that the installed onnx knows.
        dtype: dtype of x and y, to which weights and biases are rounded. Batch norms compute in that of their
            parameters.
        x: Name of the input.
        y: Name of the output.

    Returns:
        The model. Its metadata hold `batchnorm.<name>.fingerprint` for each batch norm.

    Raises:
        ValueError: There are no layers; a layer does not fit the shape before it; a trainable batch norm is
            not in eval mode or has no statistics yet; a weight is not finite in `dtype`; or an argument is
            not as described.
        TypeError: A layer is none of these kinds; or a weight, a size or `dtype` is of the wrong type.

    Example:
        >>> from batchnorm import FrozenBatchNorm
        >>> from batchnorm.onnx import Activation, Linear, export_network
        >>> norm = FrozenBatchNorm(mean=[1.0, 2.0], var=[4.0, 9.0])
        >>> model = export_network([Linear(np.eye(2)), norm, Activation("relu")], ("rows", 2))
        >>> [node.op_type for node in model.graph.node]
        ['MatMul', 'BatchNormalization', 'Relu']
    """
    named = layers if isinstance(layers, Mapping) else dict(_named(layers))
    if not named:
        raise ValueError("layers: was empty, wanted one layer or more")
    opset = checked_opset(integer("opset", opset), OLDEST_OPSET)
    element = tensor_dtype(dtype, opset, np.dtype(np.float32))
    sizes = dynamic(shape)
    network = _Network(x, sizes, element, opset)
    for name, layer in named.items():
        network.add(name, layer)
    network.block.nodes[-1].output[0] = y
    return assemble(
        network.block,
        [Value(x, element, sizes)],
        [Value(y, element, network.sizes)],
        opset=opset,
        properties=network.properties,
    )


def _named(layers: Sequence[Layer]) -> Iterable[tuple[str, Layer]]:
    for k, layer in enumerate(layers):
        kind = layer.function if isinstance(layer, Activation) else type(layer).__name__.lower()
        yield f"{'batchnorm' if isinstance(layer, _NORMS) else kind}_{k}", layer


_NORMS = (FrozenBatchNorm, BatchNorm, Fused)


class _Network:
    """A network in the making: its nodes, and the value at which it has arrived.

    Attributes:
        block: Its nodes and constants.
        value: Name of the result of the last layer.
        sizes: Sizes of that.
        properties: Metadata.
    """

    def __init__(self, x: str, sizes: list[int | str], dtype: np.dtype[Any], opset: int) -> None:
        self.block, self.value, self.sizes = Block(), x, sizes
        self.properties: dict[str, str] = {}
        self._dtype, self._opset = dtype, opset
        self._results = {x: (x, sizes)}

    def add(self, name: str, layer: object) -> None:
        """Add a layer."""
        if not name or name in self._results:
            raise ValueError(
                f"layers: name was {name!r}, wanted one that no other layer and not the input has"
            )
        self.block.begin(name)
        self._name = name
        match layer:
            case Linear():
                self._linear(layer)
            case Conv():
                self._conv(layer)
            case Activation():
                self._activation(layer.function, ("relu", "relu6", "sigmoid"))
            case Fused():
                self._fused(layer)
            case FrozenBatchNorm() | BatchNorm():
                self._fused(Fused(layer))
            case _:
                kinds = "Linear, Conv, Activation, Fused, FrozenBatchNorm or BatchNorm"
                raise TypeError(f"{name}: was {type(layer).__qualname__}, wanted {kinds}")
        self._results[name] = (self.value, self.sizes)

    def _linear(self, layer: Linear) -> None:
        weight = self._array("weight", layer.weight)
        if weight.ndim != 2:
            raise ValueError(f"{self._name}: weight was of shape {weight.shape}, wanted (outputs, inputs)")
        self._fits(-1, weight.shape[1])
        bias = self._bias(layer.bias, len(weight))
        self.sizes = [*self.sizes[:-1], len(weight)]
        if bias is not None and len(self.sizes) == 2:
            inputs = [self.value, self.block.constant("weight", weight), self.block.constant("bias", bias)]
            self.value = self.block.add("Gemm", inputs, "product", main=True, transB=1)
            return
        inputs = [self.value, self.block.constant("weight", weight.T)]
        self.value = self.block.add("MatMul", inputs, "product", main=True)
        if bias is not None:
            self.value = self.block.add("Add", [self.value, self.block.constant("bias", bias)], "sum")

    def _conv(self, layer: Conv) -> None:
        weight = self._array("weight", layer.weight)
        spatial = weight.ndim - 2
        if spatial < 1 or weight.ndim != len(self.sizes):
            wanted = f"{len(self.sizes)} axes, (outputs, inputs / groups, …), as x has"
            raise ValueError(f"{self._name}: weight was of shape {weight.shape}, wanted {wanted}")
        groups = integer("groups", layer.groups)
        if groups < 1 or len(weight) % groups:
            raise ValueError(f"{self._name}: groups was {groups}, wanted a divisor of {len(weight)} outputs")
        self._fits(1, weight.shape[1] * groups)
        bias = self._bias(layer.bias, len(weight))
        stride, dilation = (
            self._of_axes(role, value, spatial, 1)
            for role, value in (("stride", layer.stride), ("dilation", layer.dilation))
        )
        padding = self._of_axes("padding", layer.padding, spatial, 0)
        axes = zip(self.sizes[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        sizes = [self._convolved(k, *axis) for k, axis in enumerate(axes)]
        self.sizes = [self.sizes[0], len(weight), *sizes]
        inputs = [self.value, self.block.constant("weight", weight)]
        if bias is not None:
            inputs.append(self.block.constant("bias", bias))
        self.value = self.block.add(
            "Conv",
            inputs,
            "convolved",
            main=True,
            strides=stride,
            pads=[*padding, *padding],
            dilations=dilation,
            group=groups,
        )

    def _convolved(
        self, axis: int, size: int | str, kernel: int, stride: int, padding: int, dilation: int
    ) -> int | str:
        if isinstance(size, str):
            same = stride == 1 and 2 * padding == dilation * (kernel - 1)
            return size if same else f"{self._name}.d{axis}"
        result = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if result < 1:
            raise ValueError(
                f"{self._name}: a kernel of {kernel} does not fit {size} values on axis {axis + 2}"
            )
        return result

    def _activation(self, function: str, known: tuple[str, ...], *, main: bool = True) -> None:
        if function not in known:
            raise ValueError(f"{self._name}: was {function!r}, wanted {' or '.join(map(repr, known))}")
        if function == "sigmoid":
            self.value = self.block.add("Sigmoid", [self.value], "sigmoid", main=main)
            return
        self.value = self.block.add("Relu", [self.value], "relu", main=main and function == "relu")
        if function == "relu6":
            six = self.block.constant("six", np.array(6, self._dtype))
            self.value = self.block.add("Min", [self.value, six], "relu6", main=main)

    def _fused(self, fused: Fused) -> None:
        layer: object = fused.layer
        if isinstance(layer, BatchNorm):
            if layer.training:
                raise ValueError(f"{self._name}: is in train mode, wanted eval mode")
            layer = layer.freeze()
        if not isinstance(layer, FrozenBatchNorm):
            kinds = "FrozenBatchNorm or BatchNorm"
            raise TypeError(f"{self._name}: layer was {type(layer).__qualname__}, wanted {kinds}")
        rank = len(self.sizes)
        axis = axis_of(layer, rank)
        self._fits(axis, layer.channels)
        before = self.sizes
        self.value = add_layer(self.block, layer, self.value, self._dtype, rank, mode="inference")
        self.properties |= node_properties(self.block.main, layer, "inference")
        if fused.residual is not None:
            if fused.residual not in self._results:
                wanted = f"one of {', '.join(map(repr, self._results))}"
                raise ValueError(f"{self._name}: residual was {fused.residual!r}, wanted {wanted}")
            other, sizes = self._results[fused.residual]
            if sizes != before:
                shapes = f"was of shape {tuple(sizes)}, wanted {tuple(before)}"
                raise ValueError(f"{self._name}: residual {fused.residual!r} {shapes}")
            self.value = self.block.add("Add", [self.value, other], "sum")
        if fused.activation is not None:
            self._activation(fused.activation, ("relu", "relu6"), main=False)

    def _fits(self, axis: int, wanted: int) -> None:
        """Raise unless an axis of the value has this size; a size that varies is left to the runtime."""
        size = self.sizes[axis] if len(self.sizes) > 1 else None
        if size is None or (isinstance(size, int) and size != wanted):
            shapes = f"x was of shape {tuple(self.sizes)}, wanted {wanted} on axis {axis}"
            raise ValueError(f"{self._name}: {shapes}")

    def _array(self, role: str, values: ArrayLike) -> NDArray[Any]:
        array = real_array(f"{self._name}.{role}", values)
        return narrowed(role, array.astype(np.float64), self._dtype, self._name)

    def _bias(self, values: ArrayLike | None, outputs: int) -> NDArray[Any] | None:
        if values is None:
            return None
        bias = self._array("bias", values)
        if bias.shape != (outputs,):
            raise ValueError(f"{self._name}: bias was of shape {bias.shape}, wanted ({outputs},)")
        return bias

    def _of_axes(self, role: str, value: int | Sequence[int], spatial: int, least: int) -> list[int]:
        """Return a number for each spatial axis."""
        given = value if isinstance(value, Sequence) else [value] * spatial
        numbers = [integer(role, number) for number in given]
        if len(numbers) != spatial or any(number < least for number in numbers):
            wanted = f"{spatial} numbers, {least} or more"
            raise ValueError(f"{self._name}: {role} was {value!r}, wanted {wanted}")
        return numbers
