"""Checks of the numbers of one batch normalization."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm._checks import channels_where
from batchnorm.onnx.findings import Finding

_DEAD = 1e-6  # of the largest |γ|


class _Type(NamedTuple):
    """A type of x: its digits, how many of them may be lost, and its least normal number."""

    digits: float
    most_lost: int
    normal: float


_TYPES = {  # some four digits must be left in 32 and 64 bits, one to two in 16
    "float16": _Type(math.log10(2**11), 1, 2.0**-14),
    "bfloat16": _Type(math.log10(2**8), 1, 2.0**-126),
    "float32": _Type(math.log10(2**24), 3, 2.0**-126),
    "float64": _Type(math.log10(2**53), 12, 2.0**-1022),
}

Array = NDArray[Any]


@np.errstate(all="ignore")  # what is not finite is a finding
def parameter_findings(
    key: str, values: dict[str, Array], eps: float, element: np.dtype[Any], shape: list[int | None] | None
) -> list[Finding]:
    """Return the findings about the parameters of a node.

    Args:
        key: The name of the node.
        values: The parameters that could be read, by role.
        eps: ε.
        element: The type of x.
        shape: The sizes of x, if they are known.
    """
    if problem := _shapes(values, shape):
        return [Finding("damaged", "error", key, problem)]
    return [*_numbers(key, values, eps, element)]


def _numbers(key: str, values: dict[str, Array], eps: float, element: np.dtype[Any]) -> Iterator[Finding]:
    wide = {role: value.astype(np.float64) for role, value in values.items()}
    for role, value in wide.items():
        if bad := channels_where(~np.isfinite(value)):
            yield Finding("non-finite", "error", key, f"{role} is not finite in {bad}")
    if not eps > 0 or math.isinf(eps):
        yield Finding("eps", "warning" if eps == 0 else "error", key, f"epsilon is {_short(eps)}")
    if not (0 <= eps < math.inf):
        return
    if "var" in wide:
        yield from _variance(key, wide["var"], eps, values["var"].dtype)
    if "var" in wide and "mean" in wide:
        yield from _mean(key, wide["mean"], wide["var"], eps, element)
    if "gamma" in wide:
        yield from _gamma(key, wide["gamma"])


def _shapes(values: dict[str, Array], shape: list[int | None] | None) -> str:
    """Return how the shapes of the parameters contradict each other or that of x, or ""."""
    shapes = {value.shape for value in values.values()}
    if len(shapes) > 1 or any(len(one) != 1 for one in shapes):
        found = ", ".join(f"{role} {value.shape}" for role, value in values.items())
        return f"parameters of shape (channels,) are wanted, found {found}"
    if shape is not None and len(shape) < 2:
        return f"x has {len(shape)} axes, wanted 2 or more"
    channels = shape[1] if shape is not None else None
    if shapes and channels is not None and shapes != {(channels,)}:
        return f"x has {channels} channels, but the parameters have shape {shapes.pop()}"
    return ""


def _variance(key: str, var: Array, eps: float, dtype: np.dtype[Any]) -> Iterator[Finding]:
    if bad := channels_where(var < 0):
        yield Finding("negative-variance", "error", key, f"var is {_least(var[var < 0])} in {bad}")
    if bad := channels_where(var == 0):
        yield Finding("zero-variance", "error" if eps == 0 else "warning", key, f"var is 0 in {bad}")
    tiny = (var > 0) & ((var <= eps) | (var < _TYPES[dtype.name].normal))
    if bad := channels_where(tiny):
        message = f"var is {_least(var[tiny])} in {bad}, and epsilon {_short(eps)}"
        yield Finding("tiny-variance", "info", key, message)
    below = np.count_nonzero((var >= 0) & (var < eps))
    if 2 * below > var.size:
        message = f"epsilon {_short(eps)} is larger than the variance of {below} of {var.size} channels"
        yield Finding("large-eps", "warning", key, message)


def _mean(key: str, mean: Array, var: Array, eps: float, element: np.dtype[Any]) -> Iterator[Finding]:
    if var.size and (mean == 0).all() and (var == 1).all():
        yield Finding("initial-statistics", "warning", key, "all means are 0 and all variances 1")
    if element.name not in _TYPES:  # x is not of floats: the model is not valid
        return
    kind = _TYPES[element.name]
    ratio = np.where(var + eps > 0, np.abs(mean) / np.sqrt(var + eps), 0)
    lossy = (ratio > 10.0**kind.most_lost) & np.isfinite(ratio)
    if bad := channels_where(lossy):
        largest = ratio[lossy].max()
        lost = f"{math.log10(largest):.1f} of {kind.digits:.1f} digits"
        message = f"|mean|/√(var + ε) is up to {largest:.3g} in {bad}: {element.name} loses {lost}"
        yield Finding("cancellation", "warning", key, message)


def _gamma(key: str, gamma: Array) -> Iterator[Finding]:
    size = np.abs(gamma)
    dead = size <= _DEAD * size[np.isfinite(size)].max(initial=0)
    if bad := channels_where(dead):
        message = f"gamma is 0 or negligible in {bad}"
        yield Finding("dead-channels", "warning" if dead.all() else "info", key, message)


def _least(values: Array) -> str:
    return f"{values.min():.3g}"


def _short(eps: float) -> str:
    """Return an attribute, which is a float32, with no more digits than it has."""
    return str(np.float32(eps))
