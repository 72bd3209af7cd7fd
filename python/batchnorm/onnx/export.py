"""Export of a frozen batch norm as an ONNX model; `docs/onnx.md` says what each mode promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike

from batchnorm._file import BATCH_NORM, metadata
from batchnorm._types import BatchNormParameters
from batchnorm.conventions import onnx_momentum, onnx_variance
from batchnorm.onnx.edit import narrowed
from batchnorm.onnx.model import Block, Value, assemble, axis_of, checked_opset, sizes_of, tensor_dtype

OLDEST_OPSET = 9
MODES = ("inference", "exact", "affine", "training")

_OLDEST_OPSET_OF_TRAINING = 14
_PARAMETERS = ("gamma", "beta", "mean", "var")  # in the order of the node's inputs
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def build_model(
    layer: BatchNormParameters,
    *,
    opset: int,
    mode: str,
    rank: int | None,
    shape: Sequence[int | str | None] | None,
    dtype: DTypeLike | None,
    name: str,
    x: str,
    y: str,
    update_weight: float | None,
    count: int | None,
) -> onnx.ModelProto:
    """Return the layer as a model; `FrozenBatchNorm.to_onnx` documents the arguments."""
    if mode not in MODES:
        raise ValueError(f"mode: was {mode!r}, wanted {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}")
    checked_opset(opset, OLDEST_OPSET)
    tensors = tensor_dtype(dtype, opset, layer.dtype)
    if tensors == _FLOAT64 != layer.dtype:
        raise ValueError("dtype: was float64, wanted one that the layer takes, whose parameters are float32")
    sizes = sizes_of(layer, rank, shape)
    block = Block(name)
    inputs, outputs = [Value(x, tensors, sizes)], [Value(y, tensors, sizes)]
    properties = metadata(layer, BATCH_NORM) | node_properties(block.main, layer, mode)
    if mode == "training":
        momentum, count = _training_arguments(opset, sizes, axis_of(layer, len(sizes)), update_weight, count)
        for state in ("mean", "var"):
            inputs.append(Value(block.name(state), layer.dtype, [layer.channels]))
            outputs.append(Value(block.name(f"running_{state}"), layer.dtype, [layer.channels]))
        properties |= training_properties(block.main, layer, count)
        _training(block, layer, x, tensors, len(sizes), momentum, count)
    elif update_weight is not None or count is not None:
        given = "count" if update_weight is None else "update_weight"
        raise ValueError(f"{given}: is of mode 'training', and the mode was {mode!r}")
    else:
        add_layer(block, layer, x, tensors, len(sizes), mode=mode)
    block.nodes[-1].output[0] = y
    return assemble(block, inputs, outputs, opset=opset, properties=properties)


def node_properties(node: str, layer: BatchNormParameters, mode: str) -> dict[str, str]:
    """Return the metadata of a layer in a model, by the name of its node."""
    return {f"batchnorm.{node}.mode": mode, f"batchnorm.{node}.fingerprint": layer.fingerprint}


def training_properties(node: str, layer: BatchNormParameters, count: int) -> dict[str, str]:
    """Return the metadata of mode "training": what is needed to read the unbiased variance back."""
    data = layer.var.astype(layer.dtype.newbyteorder("<")).tobytes()
    return {f"batchnorm.{node}.count": str(count), f"batchnorm.{node}.var": data.hex()}


def add_layer(
    block: Block, layer: BatchNormParameters, x: str, dtype: np.dtype[Any], rank: int, *, mode: str
) -> str:
    """Add the nodes of a layer in inference to a model, and return the name of their result.

    Args:
        block: The model.
        layer: The layer.
        x: Name of the layer's input.
        dtype: dtype of x.
        rank: Rank of x.
        mode: "inference", "exact" or "affine".
    """
    add = {"inference": _inference, "exact": _exact, "affine": _affine}[mode]
    return add(block, layer, x, dtype, axis_of(layer, rank), rank)


def _inference(
    block: Block, layer: BatchNormParameters, x: str, dtype: np.dtype[Any], axis: int, rank: int
) -> str:
    """Add one BatchNormalization in inference mode."""
    values = {role: getattr(layer, role) for role in _PARAMETERS}
    return _normalization(block, layer, values, x, dtype, axis, rank)


def _normalization(
    block: Block,
    layer: BatchNormParameters,
    values: dict[str, Any],
    x: str,
    dtype: np.dtype[Any],
    axis: int,
    rank: int,
    *states: str,
    **attributes: Any,
) -> str:
    """Add one BatchNormalization with these parameters, in the dtype of the layer.

    If x has another dtype, there is a Cast on either side of it; if its channels are not on axis 1, a
    Transpose. `states` are what its outputs after y are.
    """
    constants = [block.constant(role, array) for role, array in values.items()]
    x = block.cast(x, dtype, layer.dtype, f"x_{_short(layer.dtype)}")
    x = block.exchange(x, axis, 1, rank, "x_swapped")
    inputs, outputs = [x, *constants], ("normalized", *states)
    y = block.add("BatchNormalization", inputs, *outputs, main=True, epsilon=layer.eps, **attributes)
    y = block.exchange(y, axis, 1, rank, "y_swapped")
    return block.cast(y, layer.dtype, dtype, f"y_{_short(dtype)}")


def _exact(
    block: Block, layer: BatchNormParameters, x: str, dtype: np.dtype[Any], axis: int, rank: int
) -> str:
    """Add the expression that defines inference.

    It is ((x − mean)·s + beta) in float64. For 16-bit x it is ((x − high) − low)·s + beta in float32, where s
    was computed in float64, and high + low is the mean. Nothing is folded, so that the parameters can be read
    back.
    """
    broadcast = _broadcast(layer, axis, rank)
    constants = {
        role: block.constant(role, getattr(layer, role).astype(np.float64).reshape(broadcast))
        for role in _PARAMETERS
    }
    eps = block.constant("eps", np.array(layer.eps))
    half = dtype.itemsize == 2
    wide = _FLOAT32 if half else _FLOAT64
    x = block.cast(x, dtype, wide, f"x_{_short(wide)}")
    var_eps = block.add("Add", [constants["var"], eps], "var_eps")
    scale = block.add("Div", [constants["gamma"], block.add("Sqrt", [var_eps], "sigma")], "scale")
    mean, beta = constants["mean"], constants["beta"]
    if half:
        with np.errstate(all="ignore"):
            s = layer.gamma / np.sqrt(layer.var.astype(np.float64) + layer.eps)
        for role, values in (("mean", layer.mean), ("gamma/sqrt(var + eps)", s), ("beta", layer.beta)):
            narrowed(role, values.astype(np.float64), _FLOAT32, "dtype of 16 bits")
        scale = block.cast(scale, _FLOAT64, _FLOAT32, "scale_float")
        beta = block.cast(beta, _FLOAT64, _FLOAT32, "beta_float")
        high = block.cast(mean, _FLOAT64, _FLOAT32, "mean_high")
        rest = block.add("Sub", [mean, block.cast(high, _FLOAT32, _FLOAT64, "mean_high_double")], "mean_rest")
        low = block.cast(rest, _FLOAT64, _FLOAT32, "mean_low")
        x, mean = block.add("Sub", [x, high], "centred_high"), low
    centred = block.add("Sub", [x, mean], "centred")
    scaled = block.add("Mul", [centred, scale], "scaled")
    y = block.add("Add", [scaled, beta], f"y_{_short(wide)}", main=True)
    return block.cast(y, wide, dtype, "y_cast")


def _affine(
    block: Block, layer: BatchNormParameters, x: str, dtype: np.dtype[Any], axis: int, rank: int
) -> str:
    """Add x·scale + shift in the dtype of the layer.

    Both constants are computed in float64 and rounded once.
    """
    gamma, beta, mean, var = (getattr(layer, role).astype(np.float64) for role in _PARAMETERS)
    with np.errstate(all="ignore"):  # overflow is found by `narrowed`
        scale = gamma / np.sqrt(var + layer.eps)
        shift = beta - mean * scale
    names = [
        block.constant(
            role, narrowed(role, values, layer.dtype, "mode 'affine'").reshape(_broadcast(layer, axis, rank))
        )
        for role, values in (("scale", scale), ("shift", shift))
    ]
    x = block.cast(x, dtype, layer.dtype, f"x_{_short(layer.dtype)}")
    scaled = block.add("Mul", [x, names[0]], "scaled")
    y = block.add("Add", [scaled, names[1]], "shifted", main=True)
    return block.cast(y, layer.dtype, dtype, f"y_{_short(dtype)}")


def _training_arguments(
    opset: int, sizes: list[int | str], axis: int, update_weight: float | None, count: int | None
) -> tuple[float, int]:
    """Return ONNX's momentum and the number of values per channel of every batch, or say what is wrong."""
    if opset < _OLDEST_OPSET_OF_TRAINING:
        reason = ", since before it ONNX does not say whether the running variance is biased"
        checked_opset(opset, _OLDEST_OPSET_OF_TRAINING, f" for mode 'training'{reason}")
    if update_weight is None or count is None:
        missing = "update_weight" if update_weight is None else "count"
        raise ValueError(f"{missing}: was None, wanted a number for mode 'training'")
    others = [size for k, size in enumerate(sizes) if k != axis]
    known = [size for size in others if isinstance(size, int)]
    if len(known) == len(others) and math.prod(known) != count:
        raise ValueError(
            f"count: was {count}, wanted {math.prod(known)} values per channel, as the shape has"
        )
    return onnx_momentum(update_weight), count


def _training(
    block: Block,
    layer: BatchNormParameters,
    x: str,
    dtype: np.dtype[Any],
    rank: int,
    momentum: float,
    count: int,
) -> None:
    """Add one BatchNormalization in training mode, whose running variance is ONNX's biased one."""
    var = narrowed("var", onnx_variance(layer.var, count), layer.dtype, "mode 'training'")
    values = {role: getattr(layer, role) for role in _PARAMETERS} | {"var": var}
    states = ("running_mean", "running_var")
    attributes = {"momentum": momentum, "training_mode": 1}
    _normalization(block, layer, values, x, dtype, axis_of(layer, rank), rank, *states, **attributes)


def _broadcast(layer: BatchNormParameters, axis: int, rank: int) -> tuple[int, ...]:
    """Return the shape in which numbers of the channels stand beside x."""
    return (layer.channels,) + (1,) * (rank - 1 - axis)


def _short(dtype: np.dtype[Any]) -> str:
    return {"float32": "float", "float64": "double"}.get(dtype.name, dtype.name)
