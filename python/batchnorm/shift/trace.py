"""The recorder of the shift of layers' inputs in the course of training: moments and percentiles by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchnorm import _core
from batchnorm._checks import integer, of_channels
from batchnorm._core import Moments
from batchnorm.layer import BatchNorm
from batchnorm.shift.measures import Shift, shift

PERCENTILES = (15, 50, 85)
"""The percentiles that `ShiftTrace` records, those of Figure 1 of the paper."""

_Floats = NDArray[np.float64]
_Entry = TypeVar("_Entry")


class _Series(Generic[_Entry]):
    """Entries under names, one for every `every`-th step; where they are too many, every second goes."""

    def __init__(self, every: int, limit: int) -> None:
        self.every = every
        self.limit = limit
        self.entries: dict[str, list[_Entry]] = {}

    def add(self, name: str, entry: _Entry) -> None:
        entries = self.entries.setdefault(name, [])
        entries.append(entry)
        if len(entries) > self.limit:
            for kept in self.entries.values():
                del kept[1::2]
            self.every *= 2

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.arange(max(map(len, self.entries.values()), default=0), dtype=np.int64) * self.every


class ShiftTrace:
    """Records how the inputs of layers shift during training (sections 1 and 4.1 of the paper, Figure 1).

    While it is attached, each forward pass of a layer in train mode is a step of that layer, counted from 0.
    Of each step it keeps the `Moments` that the pass computed anyway, and of every tenth the 15th, 50th and
    85th percentiles of the layer's input in chosen channels. It never changes what the layer computes. Copies
    of a layer are not traced.

    Under each name it keeps at most `limit` moments of 24 bytes a channel, and `limit` records of 24 bytes a
    chosen channel. Where there would be more, every second one goes, and from then on only every second
    step (then every fourth, and so on) is recorded: of `moment_steps` and `steps`, under all names.

    Args:
        layers: The layers by the names that they are to have; none if only `record` is used.
        channels: Channels whose percentiles are recorded: a sequence for all names, or a mapping of names to
            sequences; where there is none, channel 0.
        every: Percentiles are recorded in steps 0, `every`, 2·`every` and so on.
        values: Percentiles are of at most this many values, evenly strided over the batch and all positions.
        exact: Whether percentiles are of all values instead.
        limit: Number of moments, and of records of percentiles, that are kept under each name.

    Raises:
        ValueError: A number is less than 1, or a layer has no such channel.
        TypeError: A layer is not a `BatchNorm`, or a number is not an integer.

    Example:
        >>> import batchnorm as bn
        >>> layer, rng = bn.BatchNorm(2), np.random.default_rng(0)
        >>> with ShiftTrace({"hidden": layer}) as trace:
        ...     for step in range(30):
        ...         y = layer(rng.normal(step, 1, (60, 2)).astype(np.float32))
        >>> trace.steps.tolist(), trace.percentiles["hidden"].shape
        ([0, 10, 20], (3, 1, 3))
        >>> trace.shift("hidden")[20].mean_shift.round() > 15
        array([ True,  True])
    """

    def __init__(
        self,
        layers: Mapping[str, BatchNorm],
        *,
        channels: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
        every: int = 10,
        values: int = 1024,
        exact: bool = False,
        limit: int = 4096,
    ) -> None:
        self._layers = dict(layers)
        self._channels = channels
        self._values = _positive("values", values)
        self._exact = exact
        limit = _positive("limit", limit)
        self._moments = _Series[Moments](1, limit)
        self._percentiles = _Series[_Floats](_positive("every", every), limit)
        self._passes: dict[str, int] = {}
        self._chosen: dict[str, list[int]] = {}
        for name, layer in self._layers.items():
            if not isinstance(layer, BatchNorm):
                raise TypeError(f"layers: {name!r} was {type(layer).__qualname__}, wanted BatchNorm")
            self._choose(name, layer.channels)
        self._observers: dict[str, Callable[[NDArray[Any], Moments], None]] = {}

    def attach(self) -> Self:
        """Begin to record, and return the trace; does nothing if it is attached already."""
        for name, layer in self._layers.items():
            if name not in self._observers:
                self._observers[name] = partial(self._observe, name, layer)
                layer._observers = (*layer._observers, self._observers[name])
        return self

    def detach(self) -> None:
        """End recording, and keep what was recorded; does nothing if the trace is not attached."""
        for name, observer in self._observers.items():
            layer = self._layers[name]
            layer._observers = tuple(other for other in layer._observers if other is not observer)
        self._observers = {}

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.detach()

    def record(self, name: str, x: Any, *, channel_axis: int = 1) -> None:
        """Record an array as the next step under a name, as if it were the input of a layer of that name.

        This is for networks without batch normalization, and for other places than a layer's input.

        Args:
            name: Any name; the first call under it fixes the number of channels.
            x: Array of rank 2 or more; float16, bfloat16, float32 or float64.
            channel_axis: Axis of x that holds the channels; -1 is channels-last.

        Raises:
            ValueError: x has no values, another number of channels than before, or no chosen channel.
            TypeError: x is not an array of such a dtype.
        """
        x = _core.tensor("x", x)
        moments = _core.moments(x, channel_axis=channel_axis)
        if not x.size:
            raise ValueError(f"x: shape was {x.shape}, wanted 1 value or more in each channel")
        if recorded := self._moments.entries.get(name):
            if recorded[0].channels != moments.channels:
                wanted = f"{of_channels(recorded[0].channels)} as before under {name!r}"
                raise ValueError(f"x: was of {of_channels(moments.channels)}, wanted {wanted}")
        else:
            self._choose(name, moments.channels)
        self._add(name, x, channel_axis, moments)

    def _observe(self, name: str, layer: BatchNorm, x: NDArray[Any], moments: Moments) -> None:
        self._add(name, x, layer.channel_axis, moments)

    def _add(self, name: str, x: NDArray[Any], channel_axis: int, moments: Moments) -> None:
        step = self._passes.get(name, 0)
        self._passes[name] = step + 1
        if step % self._moments.every == 0:
            self._moments.add(name, moments)
        if step % self._percentiles.every == 0:
            values = None if self._exact else self._values
            self._percentiles.add(name, _percentiles(x, channel_axis, self._chosen[name], values))

    def _choose(self, name: str, channels: int) -> None:
        """Choose the channels whose percentiles are recorded under a name."""
        chosen = self._channels.get(name) if isinstance(self._channels, Mapping) else self._channels
        self._chosen[name] = [0] if chosen is None else [integer("channels", channel) for channel in chosen]
        for channel in self._chosen[name]:
            if not 0 <= channel < channels:
                raise ValueError(f"channels: was {channel} for {name!r}, wanted 0 to {channels - 1}")

    @property
    def moments(self) -> dict[str, tuple[Moments, ...]]:
        """The moments under each name, one for each of `moment_steps`, or of its first ones."""
        return {name: tuple(entries) for name, entries in self._moments.entries.items()}

    @property
    def moment_steps(self) -> NDArray[np.int64]:
        """The steps whose moments are kept, shape (steps,), int64."""
        return self._moments.steps

    @property
    def percentiles(self) -> dict[str, _Floats]:
        """The percentiles under each name, shape (records, chosen channels, 3), float64, as `PERCENTILES`.

        There is one record for each of `steps`, or of its first ones.
        """
        return {name: np.stack(entries) for name, entries in self._percentiles.entries.items()}

    @property
    def steps(self) -> NDArray[np.int64]:
        """The steps whose percentiles were recorded, shape (records,), int64."""
        return self._percentiles.steps

    def shift(self, name: str, reference: int | Literal["previous"] = 0) -> dict[int, Shift]:
        """Return the shift of each kept step's moments from those of a reference step, by step.

        Args:
            name: Name of a layer, or one that was given to `record`.
            reference: A step of `moment_steps`, or "previous" for the kept step before each; the first step
                has none, and is left out then.

        Raises:
            KeyError: Nothing was recorded under that name.
            ValueError: The reference is no kept step, or `shift` refuses the moments.
        """
        moments = self._moments.entries[name]
        steps = self.moment_steps[: len(moments)].tolist()
        if reference == "previous":
            pairs = zip(steps[1:], moments[1:], moments, strict=False)
            return {step: shift(live, before) for step, live, before in pairs}
        if reference not in steps:
            wanted = f"a multiple of {self._moments.every} up to {steps[-1]}, or 'previous'"
            raise ValueError(f"reference: was {reference!r}, wanted {wanted}")
        fixed = moments[steps.index(reference)]
        return {step: shift(live, fixed) for step, live in zip(steps, moments, strict=True)}

    @property
    def channels(self) -> dict[str, list[int]]:
        """The channels whose percentiles are recorded, by name."""
        return {name: list(chosen) for name, chosen in self._chosen.items()}


def _positive(name: str, value: int) -> int:
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name}: was {number}, wanted 1 or more")
    return number


@np.errstate(invalid="ignore")  # an infinite value makes a percentile beside it NaN
def _percentiles(x: NDArray[Any], channel_axis: int, channels: list[int], most: int | None) -> _Floats:
    """Return the percentiles of channels of x, shape (channels, 3), as `numpy.percentile` interpolates them.

    That function takes ten times as long for a few values.
    """
    by_channel = np.moveaxis(x, channel_axis, -1)
    axes = by_channel.shape[:-1]
    count = math.prod(axes)
    stride = 1 if most is None else -(-count // most)
    # A stride that shared a factor with the positions of an example would miss some of them, as all but the
    # first column of 32 images of 32 × 32.
    while math.gcd(stride, math.prod(axes[1:])) > 1:
        stride += 1
    taken = np.unravel_index(np.arange(0, count, stride), axes)
    values = np.stack([by_channel[(*taken, channel)] for channel in channels]).astype(np.float64)
    values.sort()
    place = np.array(PERCENTILES) / 100 * (values.shape[1] - 1)
    below = place.astype(np.intp)
    lower, upper = values[:, below], values[:, np.minimum(below + 1, values.shape[1] - 1)]
    result: _Floats = lower + (upper - lower) * (place - below)
    result[np.isnan(values[:, -1])] = np.nan  # sorted last
    return result
