"""What the two kinds of frozen layer share: rounding, the fingerprint, equality, the dtypes of tensors."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._checks import channels_where, integer
from batchnorm._core import tensor

COARSE = 1e-4
"""In standard deviations: where rounding the parameters moves the result by more, freezing warns."""

# dtypes and not types: comparing a dtype with a type first makes a dtype of it, which takes longer.
_FLOAT32 = np.dtype(np.float32)

_PACKAGE = str(Path(__file__).parent) + os.sep


class Frozen:
    """Base of the frozen layers, which are equal if their fingerprints are.

    Attributes:
        dtype: The NumPy dtype of the parameters.
        fingerprint: Lower-case hex SHA-256 of the parameters.
    """

    __slots__ = ()

    dtype: np.dtype[Any]
    fingerprint: str

    def _tensor(self, name: str, x: Any) -> NDArray[Any]:
        """Return x as a NumPy array, or raise TypeError if the layer does not take its dtype."""
        array = tensor(name, x)
        if self.dtype == _FLOAT32 and array.dtype.type is np.float64:
            raise TypeError(
                f"{name}: float64 tensors want a layer with float64 parameters, and those of this one are "
                f"float32; freeze it with dtype='float64' or convert {name}"
            )
        return array

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def checked_axis(channel_axis: int) -> int:
    """Return the channel axis as an int, or raise naming it; the fingerprint holds an int64."""
    axis = integer("channel_axis", channel_axis)
    if not -(2**63) <= axis < 2**63:
        raise ValueError(f"channel_axis: was {axis}, wanted an integer of 64 bits")
    return axis


def rounded(name: str, values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round a parameter to `dtype`, as a read-only array; its first axis is that of the channels.

    Raises:
        ValueError: A value becomes infinite, or a positive variance 0.
    """
    with np.errstate(all="ignore"):
        result = values.astype(dtype)
    lost = ~np.isfinite(result)
    if name == "var":
        lost |= (values > 0) & (result == 0)
    if lost.any():
        where = f"in {channels_where(lost)}; dtype='float64' would hold it"
        raise ValueError(f"{name}: out of the range of {dtype.name} {where}")
    return np.frombuffer(result.tobytes(), dtype).reshape(result.shape)


def fingerprint(kind: str, dtype: np.dtype[Any], head: bytes, arrays: Iterable[NDArray[Any]]) -> str:
    """Return the fingerprint that `docs/format.md` specifies: lower-case hex SHA-256.

    Args:
        kind: The kind of layer and the version of its format.
        dtype: dtype of the parameters.
        head: What is hashed before the arrays.
        arrays: The arrays, in the order in which they are hashed.
    """
    digest = hashlib.sha256(f"{kind}\n{dtype.name}\n".encode("ascii"))
    digest.update(head)
    for values in arrays:
        digest.update(values.astype(dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def warn_of_rounding(parameter: str, moved: str, coarse: NDArray[np.bool_], dtype: np.dtype[Any]) -> None:
    """Warn if rounding a parameter moves something by more than `COARSE` in a channel; names the channels."""
    if coarse.any():
        warnings.warn(
            f"{parameter}: rounding to {dtype.name} moves {moved} by more than {COARSE:g} standard "
            f"deviations in {channels_where(coarse)}; dtype='float64' keeps it",
            stacklevel=_stacklevel_outside(),
        )


def _stacklevel_outside() -> int:
    """Return the `stacklevel` with which a warning of the caller names a line outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
