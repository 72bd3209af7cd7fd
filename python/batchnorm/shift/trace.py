"""The recorder of the shift of layers' inputs in the course of training: moments and percentiles by step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from batchnorm import _core
from batchnorm._atomic import replacing
from batchnorm._checks import integer, of_channels
from batchnorm._core import Moments
from batchnorm._trainable import Trainable
from batchnorm.shift.measures import Shift, shift, statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = (15, 50, 85)
"""The percentiles that `ShiftTrace` records, those of Figure 1 of the paper."""

_FORMAT = "batchnorm-shift-trace/1"
_FRACTIONS = np.array(PERCENTILES) / 100
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

    Memory is bounded: under each name there are at most `limit` moments of 24 bytes a channel, and `limit`
    records of 24 bytes a chosen channel, each with a few hundred bytes of its own. Where there would be more,
    every second one goes, under all names, and the steps that are recorded from then on are twice as far
    apart.

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
        TypeError: A layer is neither a `BatchNorm` nor a `Whitening`, or a number is not an integer.

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
        layers: Mapping[str, Trainable[Any]],
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
        self._chosen: dict[str, NDArray[np.intp]] = {}
        given: Mapping[str, object] = layers
        for name, layer in given.items():
            if not isinstance(layer, Trainable):
                wanted = "a BatchNorm or a Whitening"
                raise TypeError(f"layers: {name!r} was {type(layer).__qualname__}, wanted {wanted}")
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
            name: Any name but a layer's; the first call under it fixes the number of channels.
            x: Array of rank 2 or more; float16, bfloat16, float32 or float64.
            channel_axis: Axis of x that holds the channels; -1 is channels-last.

        Raises:
            ValueError: The name is a layer's, a channel (named) has fewer than 2 values or values that are
                not finite, or x has another number of channels than before, or not all chosen ones. Nothing
                is recorded then.
            TypeError: x is not an array of such a dtype.
        """
        if name in self._layers:
            raise ValueError(f"name: was {name!r}, the name of a layer, wanted another")
        x = _core.tensor("x", x)
        moments = _core.moments(x, channel_axis=channel_axis)
        statistics("x", moments)
        if recorded := self._moments.entries.get(name):
            if recorded[0].channels != moments.channels:
                wanted = f"{of_channels(recorded[0].channels)} as before under {name!r}"
                raise ValueError(f"x: was of {of_channels(moments.channels)}, wanted {wanted}")
        else:
            self._choose(name, moments.channels)
        self._add(name, x, channel_axis, moments)

    def _observe(self, name: str, layer: Trainable[Any], x: NDArray[Any], moments: Moments) -> None:
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
        if chosen is None:
            chosen = [0]
        if not isinstance(chosen, Iterable):
            raise TypeError(f"channels: was {chosen!r} for {name!r}, wanted a sequence of integers")
        numbers = [integer("channels", channel) for channel in chosen]
        for channel in numbers:
            if not 0 <= channel < channels:
                raise ValueError(f"channels: was {channel} for {name!r}, wanted 0 to {channels - 1}")
        self._chosen[name] = np.array(numbers, np.intp)

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

    @property
    def channels(self) -> dict[str, list[int]]:
        """The channels whose percentiles are recorded, by name."""
        return {name: chosen.tolist() for name, chosen in self._chosen.items()}

    def shift(self, name: str, reference: int | Literal["previous"] = 0) -> dict[int, Shift]:
        """Return the shift of each kept step's moments from those of a reference step, by step.

        Args:
            name: Name of a layer, or one that was given to `record`.
            reference: A step of `moment_steps`, or "previous" for the kept step before each; the first step
                has none, and is left out then.

        Raises:
            ValueError: Nothing was recorded under that name, or the reference is no kept step.
        """
        moments = self._moments.entries.get(name)
        if moments is None:
            raise ValueError(f"name: was {name!r}, wanted one of {sorted(self._moments.entries)}")
        steps = self.moment_steps[: len(moments)].tolist()
        if reference == "previous":
            pairs = zip(steps[1:], moments[1:], moments, strict=False)
            return {step: shift(live, before) for step, live, before in pairs}
        if reference not in steps:
            wanted = f"a multiple of {self._moments.every} up to {steps[-1]}, or 'previous'"
            raise ValueError(f"reference: was {reference!r}, wanted {wanted}")
        fixed = moments[steps.index(reference)]
        return {step: shift(live, fixed) for step, live in zip(steps, moments, strict=True)}

    def plot(self, reference: int | Literal["previous"] = 0) -> Figure:
        """Plot what was recorded by step, one row for each name.

        On the left are the medians of the chosen channels in bands from the 15th to the 85th percentile, as
        Figure 1 of the paper has them; on the right is `w2` to the reference, its mean over all channels and
        its maximum.

        Args:
            reference: As for `shift`.

        Returns:
            A figure outside pyplot; `savefig` writes it.

        Raises:
            ImportError: The package matplotlib is not installed.
            ValueError: Nothing was recorded, or the reference is no kept step.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise _missing("plot", "matplotlib") from error

        names = list(self._moments.entries)
        if not names:
            raise ValueError("plot: nothing was recorded")
        figure = Figure(figsize=(10, 2.5 * len(names)), layout="constrained")
        percentiles, steps = self.percentiles, self.steps
        for name, (left, right) in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
            for channel, record in zip(self._chosen[name], percentiles[name].swapaxes(0, 1), strict=True):
                low, median, high = record.T
                (line,) = left.plot(steps[: len(record)], median, label=f"channel {channel}")
                left.fill_between(steps[: len(record)], low, high, color=line.get_color(), alpha=0.25)
            left.set(title=name, xlabel="step", ylabel="input")
            if left.lines:  # matplotlib warns of a legend of nothing
                left.legend()
            shifts = self.shift(name, reference)
            right.plot(list(shifts), [measured.w2.mean() for measured in shifts.values()], label="mean")
            right.plot(list(shifts), [measured.w2.max() for measured in shifts.values()], label="maximum")
            origin = "the step before" if reference == "previous" else f"step {reference}"
            right.set(title=name, xlabel="step", ylabel=f"w2 to {origin}")
            right.legend()
        return figure

    def to_npz(self, path: str | PathLike[str]) -> None:
        """Save what was recorded to `path` as a NumPy archive, whole or not at all; `from_npz` loads it.

        Raises:
            OSError: The file cannot be written; an old file at `path` is unchanged.
        """
        names = list(self._moments.entries)
        arrays = {
            "format": np.array(_FORMAT),
            "names": np.array(names, np.str_),
            "passes": np.array([self._passes[name] for name in names], np.int64),
            "every": np.array([self._moments.every, self._percentiles.every]),
            "limit": np.array(self._moments.limit),
            "values": np.array(self._values),
            "exact": np.array(self._exact),
        }
        percentiles = self.percentiles
        for k, (name, moments) in enumerate(self._moments.entries.items()):
            for field in ("count", "mean", "m2"):
                arrays[f"{k}.{field}"] = np.stack([getattr(entry, field) for entry in moments])
            arrays[f"{k}.channels"] = self._chosen[name]
            arrays[f"{k}.percentiles"] = percentiles[name]
        with replacing(Path(path)) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes them for allow_pickle

    @classmethod
    def from_npz(cls, path: str | PathLike[str]) -> Self:
        """Load a trace that `to_npz` saved. It has no layers; `record` goes on where the trace ended.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not that of a trace.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                found = dict(archive)
            if found["format"] != _FORMAT:
                raise ValueError(f"format was {found['format']}, wanted {_FORMAT}")
            values, exact, limit = (found[key].item() for key in ("values", "exact", "limit"))
            trace = cls({}, values=values, exact=exact, limit=limit)
            trace._moments.every, trace._percentiles.every = found["every"].tolist()
            for k, name in enumerate(found["names"].tolist()):
                moments = zip(*(found[f"{k}.{field}"] for field in ("count", "mean", "m2")), strict=True)
                trace._moments.entries[name] = [Moments(*fields) for fields in moments]
                trace._passes[name] = int(found["passes"][k])
                trace._chosen[name] = found[f"{k}.channels"]
                trace._percentiles.entries[name] = list(found[f"{k}.percentiles"])
        except (BadZipFile, EOFError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: not a trace that to_npz saved: {error}") from error
        return trace

    def to_parquet(self, path: str | PathLike[str]) -> None:
        """Save what was recorded to `path` as a Parquet file in long form, whole or not at all.

        Its columns are name (text), step (int64), channel (int64), quantity (text) and value (float64). The
        quantities are count, mean and var (the biased variance, the paper's σ²_B) of all channels, and p15,
        p50 and p85 of the chosen ones.

        Raises:
            ImportError: The package pyarrow is not installed.
            OSError: The file cannot be written; an old file at `path` is unchanged.
        """
        try:
            import pyarrow as pa
            from pyarrow.parquet import ParquetWriter
        except ImportError as error:
            raise _missing("to_parquet", "pyarrow") from error

        texts = {"name": pa.string(), "quantity": pa.string()}
        numbers = {"step": pa.int64(), "channel": pa.int64(), "value": pa.float64()}
        schema = pa.schema(texts | numbers)
        with replacing(Path(path)) as file, ParquetWriter(file, schema) as writer:
            for name, quantity, steps, channels, values in self._blocks():
                step, channel = np.meshgrid(steps, channels, indexing="ij")
                columns = [pa.repeat(name, values.size), pa.repeat(quantity, values.size)]
                columns += [pa.array(column.ravel()) for column in (step, channel, values)]
                writer.write_table(pa.table(columns, schema=schema))

    def _blocks(self) -> Iterator[tuple[str, str, NDArray[np.int64], NDArray[np.intp], _Floats]]:
        """Yield name, quantity, steps, channels and values, shape (steps, channels)."""
        for name, moments in self._moments.entries.items():
            channels = np.arange(moments[0].channels)
            for field in ("count", "mean", "var"):
                values = np.stack([getattr(entry, field) for entry in moments])
                yield name, field, self.moment_steps[: len(values)], channels, values
        for name, percentiles in self.percentiles.items():
            for k, percentile in enumerate(PERCENTILES):
                values = percentiles[:, :, k]
                yield name, f"p{percentile}", self.steps[: len(values)], self._chosen[name], values


def _missing(method: str, package: str) -> ImportError:
    return ImportError(f"ShiftTrace.{method} needs the package {package}: pip install 'batchnorm[shift]'")


def _positive(name: str, value: int) -> int:
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name}: was {number}, wanted 1 or more")
    return number


def _percentiles(x: NDArray[Any], channel_axis: int, channels: NDArray[np.intp], most: int | None) -> _Floats:
    """Return the percentiles of channels of x, shape (channels, 3), as `numpy.percentile` interpolates them.

    That function takes several times as long for a few values. Where not all values are finite, a percentile
    is what IEEE arithmetic makes of them, and NaN if one of them is.
    """
    by_channel = np.moveaxis(x, channel_axis, 0)
    axes = by_channel.shape[1:]
    count = math.prod(axes)
    stride = 1 if most is None else -(-count // most)
    # A stride that shared a factor with the positions of an example would miss some of them, as all but the
    # first column in 32 images of 32 × 32.
    while math.gcd(stride, math.prod(axes[1:])) > 1:
        stride += 1
    places = np.unravel_index(np.arange(0, count, stride), axes)
    values = by_channel[(channels[:, np.newaxis], *places)].astype(np.float64)
    values.sort()
    last = values.shape[1] - 1
    ranks = _FRACTIONS * last
    below = ranks.astype(np.intp)
    lower, upper = values[:, below], values[:, np.minimum(below + 1, last)]
    with np.errstate(invalid="ignore"):
        result: _Floats = lower + (upper - lower) * (ranks - below)
    result[np.isnan(values[:, last])] = np.nan  # NaN is sorted last
    return result
