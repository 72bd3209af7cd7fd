"""Frozen batch norms folded into the linear maps beside them, which then need no batch norm.

With s = γ/√(Var[x] + ε) and t = β − E[x]·s, a frozen batch norm is y = s·x + t for each channel. Behind a
linear map W·x + b it makes a linear map with weight s·W, by output channels, and bias s·(b − E[x]) + β.
Before one it makes a map with weight W·s, by input channels, and bias W·t + b. All is computed in float64 and
rounded once.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._checks import channels_where, integer, of_channels
from batchnorm._core import real_array
from batchnorm._types import BatchNormParameters

LinearKind: TypeAlias = Literal["linear", "conv", "conv_transpose"]
"""Which axes a weight has: (out, in), (out, in/groups, kernel…) or (in, out/groups, kernel…)."""

Array = NDArray[Any]


def fold(
    layer: BatchNormParameters,
    kind: LinearKind,
    weight: Array,
    bias: Array | None,
    *,
    groups: int = 1,
    before: bool = False,
    padded: bool = False,
    dtype: np.dtype[Any] | None = None,
) -> tuple[Array, Array]:
    """Return weight and bias of the linear map that a layer and the linear map beside it make together.

    Args:
        layer: The batch norm.
        kind: Says which axes the weight has.
        weight: The weight, of floats.
        bias: The bias: shape (out,), or any that broadcasts with it; zeros if None.
        groups: Number of groups of a convolution.
        before: Whether the batch norm comes before the linear map.
        padded: Whether the linear map pads its input.
        dtype: dtype of the result; that of the weight if None.

    Raises:
        ValueError: Shapes do not fit, a value is not finite, or a result is not in the range of `dtype`; or
            all weights of a channel become 0 in it; or the batch norm comes before a convolution that pads,
            and adds something to a channel.
    """
    dtype = weight.dtype if dtype is None else dtype
    wanted_rank = "2" if kind == "linear" else "3 or more"
    if (weight.ndim != 2) if kind == "linear" else (weight.ndim < 3):
        raise ValueError(f"weight: shape was {weight.shape}, wanted {wanted_rank} axes")
    parts = _by_groups(kind, weight, groups)
    outputs, inputs = groups * parts.shape[1], groups * parts.shape[2]
    channels, side = (inputs, "input") if before else (outputs, "output")
    if channels != layer.channels:
        found = f"{of_channels(channels).replace(' ', f' {side} ', 1)} (shape {weight.shape})"
        raise ValueError(f"weight: was of {found}, wanted {layer.channels}, as the batch norm has")
    bias = np.zeros(outputs) if bias is None else bias
    if not _broadcasts(bias.shape, outputs):
        raise ValueError(f"bias: shape was {bias.shape}, wanted ({outputs},)")
    _check("weight", parts.reshape(outputs, -1), "not finite")
    _check("bias", bias.T, "not finite")

    with np.errstate(all="ignore"):  # what overflows is found in the result
        mean, beta = layer.mean.astype(np.float64), layer.beta.astype(np.float64)
        scale = layer.gamma.astype(np.float64) / np.sqrt(layer.var.astype(np.float64) + layer.eps)
        offset = bias.astype(np.float64)
        if before:
            shift = beta - mean * scale
            if padded and (there := channels_where(shift != 0)):
                message = "the zeros of the padding come behind the batch norm, which must add 0 to be folded"
                raise ValueError(f"padded: {message}, but beta − mean·scale is not 0 in {there}")
            added = (parts.sum(axis=3) * shift.reshape(groups, 1, -1)).sum(axis=2)
            parts = parts * scale.reshape(groups, 1, -1, 1)
            offset = offset + added.reshape(-1)
        else:
            parts = parts * scale.reshape(groups, -1, 1, 1)
            offset = scale * (offset - mean) + beta
        exact, parts, offset = parts, parts.astype(dtype), offset.astype(dtype)
    lost = f"out of the range of {dtype.name} after folding"
    _check("weight", parts.reshape(outputs, -1), lost)
    _check("bias", offset.T, lost)
    by_channel = (exact.reshape(outputs, -1) != 0).any(axis=1)
    if there := channels_where(by_channel & (parts.reshape(outputs, -1) == 0).all(axis=1)):
        raise ValueError(f"weight: all values are 0 in {dtype.name} after folding in {there}")
    return _from_groups(kind, parts, weight.shape), offset


def fold_arrays(
    layer: BatchNormParameters,
    kind: LinearKind,
    weight: ArrayLike,
    bias: ArrayLike | None,
    *,
    groups: int = 1,
    before: bool = False,
    padded: bool = False,
) -> tuple[Array, Array]:
    """Fold a layer as `fold` does, after a look at what a user passed; `FrozenBatchNorm` documents it."""
    weight = real_array("weight", weight)
    if weight.dtype.kind in "iu":
        raise TypeError(f"weight: dtype was {weight.dtype}, wanted floats, in which the result is rounded")
    bias = None if bias is None else real_array("bias", bias)
    groups = integer("groups", groups)
    folded = fold(layer, kind, weight, bias, groups=groups, before=before, padded=padded)
    wanted = folded[1].shape[-1:]
    if bias is not None and bias.shape != wanted:
        raise ValueError(f"bias: shape was {bias.shape}, wanted {wanted}")
    return folded


def _by_groups(kind: LinearKind, weight: Array, groups: int) -> NDArray[np.float64]:
    """Return a weight in float64 as (groups, out/groups, in/groups, size of the kernel)."""
    first, second, *kernel = weight.shape
    if groups < 1 or first % groups:
        raise ValueError(f"groups: was {groups}, wanted a divisor of {of_channels(first)}")
    parts = weight.astype(np.float64).reshape(groups, first // groups, second, math.prod(kernel))
    return parts.swapaxes(1, 2) if kind == "conv_transpose" else parts


def _from_groups(kind: LinearKind, parts: Array, shape: tuple[int, ...]) -> Array:
    if kind == "conv_transpose":
        parts = parts.swapaxes(1, 2)
    return np.ascontiguousarray(parts).reshape(shape)


def _broadcasts(shape: tuple[int, ...], channels: int) -> bool:
    """Return whether a bias of this shape broadcasts with (channels,) and keeps their number."""
    return not shape or shape[-1] in (1, channels)


def _check(name: str, values: Array, what: str) -> None:
    """Raise ValueError if a value, of which the first axis is that of the channels, is not finite."""
    if there := channels_where(~np.isfinite(np.atleast_1d(values))):
        raise ValueError(f"{name}: {what} in {there}")
