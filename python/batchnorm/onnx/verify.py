"""How far the results of an exported model in ONNX Runtime are from the exact ones, and from ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from batchnorm.frozen import FrozenBatchNorm
from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.runtime import open_session

if TYPE_CHECKING:
    import onnxruntime

_DIGITS = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126), "float64": (52, -1022)}
"""Bits of the fraction, and the least exponent, of each dtype."""
_ROWS = 4096  # of generated data, in a tensor of rank 2


class Errors(NamedTuple):
    """Differences of results, in ulps: the largest and the mean."""

    max: float
    mean: float


class Verification(NamedTuple):
    """What `verify` found; an ulp is that of the tensor's dtype at the largest of `|γ·x̂|`, `|β|` and `|y|`.

    Attributes:
        values: Number of values compared.
        reference_bits: Significant bits of the numbers of the reference.
        runtime: Errors of ONNX Runtime's y against the reference.
        ours: Errors of the layer's own y against the reference.
        between: Differences of ONNX Runtime's y from the layer's own.
        differing: Number of values in which these two differ in a bit; NaNs are all equal.
    """

    values: int
    reference_bits: int
    runtime: Errors
    ours: Errors
    between: Errors
    differing: int

    def as_dict(self) -> dict[str, Any]:
        """Return the same as dictionaries, as JSON has it."""
        return self._asdict() | {
            name: getattr(self, name)._asdict() for name in ("runtime", "ours", "between")
        }


def verify(model: ModelSource, layer: FrozenBatchNorm, x: NDArray[Any] | None = None) -> Verification:
    """Run a model of a frozen batch norm in ONNX Runtime, and compare its results.

    The reference is the layer's definition in extended precision (float64 where the machine has none wider).

    Args:
        model: The model, as `FrozenBatchNorm.to_onnx` writes it in any mode but "training".
        layer: The layer.
        x: Array of the dtype and shape of the model's input. If None, seeded normal values with the mean and
            variance of each channel, of 4096 rows if the model does not fix their number.

    Raises:
        ImportError: The package onnxruntime is not installed.
        ValueError: ONNX Runtime does not run the model, or x does not fit it; or the model is in training
            mode, where y is not that of the layer; or there are no values.
        TypeError: x is of another dtype than the model's input.
    """
    graph = Graph(model)
    entry, wanted = _input_of(graph)
    if x is None:
        x = generated(layer, entry, wanted)
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x: was {type(x).__name__}, wanted an array")
    if x.dtype != wanted:
        raise TypeError(f"x: was {x.dtype}, wanted {wanted}, as the model has it")
    if not x.size:
        raise ValueError(f"x: was of shape {x.shape}, wanted values")
    y = infer(graph, open_session(graph), x)
    if y.shape != x.shape:
        raise ValueError(f"{graph.where}: y has shape {y.shape}, wanted {x.shape}, that of x")
    ours = layer(x)
    exact, size = _reference(layer, x)
    unit = _ulp(size, x.dtype)
    differing = (_bits(y) != _bits(ours)) & ~(np.isnan(y) & np.isnan(ours))
    return Verification(
        x.size,
        np.finfo(exact.dtype).nmant + 1,
        _errors(y, exact, unit),
        _errors(ours, exact, unit),
        _errors(y, ours, unit),
        int(np.count_nonzero(differing)),
    )


def generated(layer: FrozenBatchNorm, entry: onnx.ValueInfoProto, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return seeded normal values with the mean and variance of each channel, for an input of a model."""
    dims = entry.type.tensor_type.shape.dim
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    axis = layer.channel_axis % len(sizes)
    free = [k for k, size in enumerate(sizes) if size is None]
    # About as many values whatever the rank: 4096 rows, or 64 images of 8 × 8.
    each = round(_ROWS ** (1 / max(len(free), 1)))
    shape = [each if size is None else size for size in sizes]
    beside = [-1 if k == axis else 1 for k in range(len(sizes))]
    mean, var = (values.astype(np.float64).reshape(beside) for values in (layer.mean, layer.var))
    x = np.random.default_rng(0).normal(size=shape) * np.sqrt(var + layer.eps) + mean
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def infer(graph: Graph, session: onnxruntime.InferenceSession, x: NDArray[Any]) -> NDArray[Any]:
    """Return the first output of a model, of x's dtype and shape, for its first input.

    NumPy does not know bfloat16, and ONNX Runtime takes it as the bits that lie in memory.

    Raises:
        ValueError: ONNX Runtime cannot compute it.
    """
    x, y = np.ascontiguousarray(x), np.empty(x.shape, x.dtype)
    element = helper.np_dtype_to_tensor_dtype(x.dtype)
    binding = session.io_binding()
    try:
        for bind, entry, array in (
            (binding.bind_input, session.get_inputs()[0], x),
            (binding.bind_output, session.get_outputs()[0], y),
        ):
            bind(entry.name, "cpu", 0, element, array.shape, array.ctypes.data)
        session.run_with_iobinding(binding)
    except Exception as error:  # of many types without a common one
        message = " ".join(str(error).split())
        raise ValueError(f"{graph.where}: ONNX Runtime cannot run the model: {message}") from error
    return y


def _input_of(graph: Graph) -> tuple[onnx.ValueInfoProto, np.dtype[Any]]:
    """Return the one input of a model in inference mode, and its dtype."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        found = f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs"
        raise ValueError(f"{graph.where}: a model from one x to one y wanted, found {found}")
    (entry,) = graph.inputs.values()
    return entry, helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)


def _reference(layer: FrozenBatchNorm, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return y in extended precision, and the largest of |γ·x̂|, |β| and |y|."""
    long = np.longdouble
    shape = [1] * x.ndim
    shape[layer.channel_axis] = layer.channels
    gamma, beta, mean, var = (
        getattr(layer, name).astype(long).reshape(shape) for name in ("gamma", "beta", "mean", "var")
    )
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64).astype(long)  # by way of float64, since ml_dtypes knows no long double
        scaled = gamma * ((wide - mean) / np.sqrt(var + long(layer.eps)))
        y = scaled + beta
    return y, np.maximum(np.maximum(abs(scaled), abs(beta)), abs(y))


def _ulp(size: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the distance of neighbouring numbers of `dtype` at `size`, in extended precision."""
    digits, least = _DIGITS[dtype.name]
    exponents = np.maximum(np.frexp(size)[1] - 1, least) - digits
    ulp: NDArray[Any] = np.ldexp(np.longdouble(1), exponents)
    return ulp


def _errors(y: NDArray[Any], reference: NDArray[Any], unit: NDArray[Any]) -> Errors:
    """Return the errors in units of `unit`; where both are the same infinity or NaN, there is none."""
    y, reference = (
        values if values.dtype == np.longdouble else values.astype(np.float64) for values in (y, reference)
    )
    with np.errstate(all="ignore"):
        error = np.abs(y - reference) / unit
        error = np.where((y == reference) | (np.isnan(y) & np.isnan(reference)), 0, error)
    error = np.where(np.isnan(error), np.inf, error)
    return Errors(float(error.max()), float(error.mean()))


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(f"u{values.dtype.itemsize}")
