"""Checks of per-channel values that several modules make."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray


def channels_where(bad: NDArray[np.bool_]) -> str:
    """Name the channels where ``bad``, or return an empty string where there are none."""
    if not np.count_nonzero(bad):  # the common case, ten times as fast as to look where
        return ""
    found = np.flatnonzero(bad)
    more = f" and {found.size - 8} more" if found.size > 8 else ""
    return f"channel{'s' if found.size > 1 else ''} {', '.join(map(str, found[:8]))}{more}"


def finite_vector(name: str, value: ArrayLike, dtype: DTypeLike) -> NDArray[Any]:
    """Copy ``value`` to a vector of ``dtype``, or raise naming the argument and what was wrong with it."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: dtype was {array.dtype}, wanted real numbers")
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: shape was {array.shape}, wanted (channels,)")
    with np.errstate(over="ignore"):
        vector = array.astype(dtype)
    if bad := channels_where(~np.isfinite(vector)):
        raise ValueError(f"{name}: not finite as {np.dtype(dtype)} in {bad}")
    return vector
