"""What the command line computes of a source beside its results: statistics, and what rounding it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchnorm._checks import channels_where
from batchnorm._core import CoMoments, Moments
from batchnorm._frozen import COARSE
from batchnorm._kinds import AnyFrozen
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.streaming import CsvSource, NpySource, counted, rounding_error

_Statistics = TypeVar("_Statistics", Moments, CoMoments)


class Rounding:
    """Largest error of each channel from rounding the values of a source to the dtype of a layer."""

    def __init__(self, dtype: np.dtype[Any], source: NpySource | CsvSource, channel_axis: int) -> None:
        self._dtype, self._source, self._channel_axis = dtype, source, channel_axis
        self._error = np.zeros(source.channels)

    def add(self, chunk: NDArray[Any]) -> None:
        """Take the errors of a chunk into account."""
        np.maximum(self._error, rounding_error(chunk, self._dtype, self._channel_axis), out=self._error)

    def warning(self, layer: AnyFrozen) -> str:
        """Return a warning if the errors move the results of the layer too far; else an empty string.

        Too far is 1e-4 standard deviations of the values of a batch norm. The results of a whitening layer
        have the standard deviation 1 for γ = 1, and the errors of all channels of a group may add up in them.
        """
        if isinstance(layer, FrozenBatchNorm):
            sigma = np.sqrt(layer.var.astype(np.float64) + layer.eps)
            moves, unit, coarse = "moves values", " standard deviations", self._error > COARSE * sigma
        else:
            weights = np.abs(layer.matrix.astype(np.float64)).reshape(layer.groups, -1, layer.matrix.shape[1])
            with np.errstate(invalid="ignore"):  # an infinite error times 0, which is NaN, is too far too
                moved = (weights @ self._error.reshape(layer.groups, -1, 1)).ravel()
            moves, unit, coarse = "may move results", "", ~(moved <= COARSE)
        if not (there := channels_where(coarse)):
            return ""
        return (
            f"{self._source.name}: rounding to {self._dtype.name} {moves} by more than {COARSE:g}{unit} in "
            f"{there}; a layer fitted with --dtype float64 keeps them"
        )


def statistics(
    source: NpySource | CsvSource,
    measure: Callable[[NDArray[Any]], _Statistics],
    rounding: Rounding,
    advance: Callable[[float | None], None],
) -> Iterator[_Statistics]:
    """Yield the statistics of each chunk of a source.

    Args:
        source: The source.
        measure: Returns the statistics of a chunk.
        rounding: Is given each chunk.
        advance: Is given the fraction done after each chunk.

    Raises:
        ValueError: Values or their variance are not finite; names the channels.
    """
    for done, chunk in source.chunks():
        rounding.add(chunk)
        part = measure(chunk)
        moments = part.moments if isinstance(part, CoMoments) else part
        if bad := channels_where(~(np.isfinite(moments.mean) & np.isfinite(moments.m2))):
            raise ValueError(f"{source.name}: values or their variance are not finite in {bad}")
        yield part
        advance(done)


def check_fit_together(layer: AnyFrozen, model: str, source: NpySource | CsvSource) -> None:
    """Raise ValueError or TypeError if the layer of the file `model` does not take the data of the source."""
    axis, name = layer.channel_axis, source.name
    if source.channels != layer.channels or (isinstance(source, CsvSource) and axis not in (1, -1)):
        found = counted(source.channels, "channel")
        raise ValueError(f"{name}: {found}, but {model} wants {layer.channels} on axis {axis}")
    if layer.dtype == np.float32 and isinstance(source, NpySource) and source.dtype.itemsize == 8:
        raise TypeError(
            f"{name}: float64, but {model} is float32; fit it with --dtype float64, or convert {name}"
        )
