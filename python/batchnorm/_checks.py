"""Checks of arguments that several modules make."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm._core import real_array


def channels_where(bad: NDArray[np.bool_]) -> str:
    """Return the channels, along axis 0, where `bad` is true, as text; an empty string if there are none."""
    if not np.count_nonzero(bad):  # the common case, ten times as fast as looking for channels
        return ""
    found = np.unique(np.nonzero(bad)[0])
    more = f" and {found.size - 8} more" if found.size > 8 else ""
    return f"channel{'s' if found.size > 1 else ''} {', '.join(map(str, found[:8]))}{more}"


def of_channels(number: int) -> str:
    """Return "1 channel", "2 channels" and so on."""
    return f"{number} channel{'' if number == 1 else 's'}"


@np.errstate(all="ignore")  # overflow is found by a look at the result
def finite_vector(name: str, value: ArrayLike, dtype: DTypeLike) -> NDArray[Any]:
    """Copy `value` to a vector of `dtype`, or raise naming the argument and what was wrong with it."""
    array = real_array(name, value)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: shape was {array.shape}, wanted (channels,)")
    vector = array.astype(dtype)
    if bad := channels_where(~np.isfinite(vector)):
        raise ValueError(f"{name}: not finite as {np.dtype(dtype)} in {bad}")
    return vector


def integer(name: str, value: SupportsIndex) -> int:
    """Return `value` as an int, or raise TypeError naming the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: was {value!r}, wanted an integer")
    return operator.index(value)


def number(name: str, value: Any) -> float:
    """Return `value` as a float, or raise TypeError naming the argument."""
    # Text and booleans convert too, but surely by mistake.
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: was {value!r}, wanted a number")
    return float(value)


def mapping(name: str, value: object, example: str) -> None:
    """Raise TypeError unless `value` maps names to arrays."""
    if not isinstance(value, Mapping):
        found = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name}: was {found}, wanted a mapping of names to arrays, as {example} returns it")


def parameter_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return float32 or float64 as a NumPy dtype, or raise TypeError."""
    for wanted in (np.dtype(np.float32), np.dtype(np.float64)):
        # NumPy reads None as float64, but here None is surely a mistake.
        if dtype is not None and wanted == dtype:
            return wanted
    raise TypeError(f"dtype: was {dtype!r}, wanted float32 or float64")
