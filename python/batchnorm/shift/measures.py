"""Measures of the shift between two distributions of a layer's inputs, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm._checks import channels_where, of_channels
from batchnorm._core import Moments
from batchnorm.frozen import FrozenBatchNorm

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Summary:
    """One measure over all channels, by its absolute value.

    Attributes:
        mean: Mean over the channels.
        max: Largest value.
        channel: The channel that has it, the first of equal ones.
    """

    mean: float
    max: float
    channel: int


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """How far each channel of the live data has shifted from the reference; `shift` makes it.

    All measures but z compare the normal distributions N(mean, var + ε) of the two, in units of the
    reference's σ = √(var + ε). Each is an array of shape (channels,), float64, and never NaN.

    Attributes:
        mean_shift: (mean_live − mean_ref)/σ_ref; where σ_ref is 0, ±inf, or 0 if the means are equal.
        log_variance_ratio: ln((var_live + ε)/(var_ref + ε)); inf or -inf where only the reference's or
            the live variance is 0 (with ε), and 0 where both are.
        kl: Kullback–Leibler divergence of the live distribution from the reference, KL(live‖ref), in nats:
            (mean_shift² + r − 1 − ln r)/2 with r = (var_live + ε)/(var_ref + ε); inf where only one of the
            two variances is 0 (with ε), or both are and the means differ.
        w2: Wasserstein distance of order 2 in units of σ_ref, √(mean_shift² + (σ_live/σ_ref − 1)²); where
            σ_ref is 0, inf, or 0 if the two distributions are equal.
        z: The difference of the means over its standard error, without ε: √(var_live/count_live +
            var_ref/count_ref) between moments, √(var_live/count_live) to a frozen layer; where that is 0,
            ±inf, or 0 if the means are equal.
    """

    mean_shift: _Floats
    log_variance_ratio: _Floats
    kl: _Floats
    w2: _Floats
    z: _Floats

    def summary(self) -> dict[str, Summary]:
        """Return mean, maximum and its channel of each measure's absolute value, by the measure's name."""
        return {name: _summary(getattr(self, name)) for name in self.__slots__}


def _summary(values: _Floats) -> Summary:
    sizes = np.abs(values)
    channel = int(sizes.argmax())
    return Summary(float(sizes.mean()), float(sizes[channel]), channel)


@np.errstate(all="ignore")  # zero variances make divisions by 0 that are given their meaning below
def shift(live: Moments, reference: Moments | FrozenBatchNorm) -> Shift:
    """Measure how far the live data have shifted from the reference, channel by channel.

    The variances of moments are the unbiased ones. A frozen layer's mean and variance count as exactly known,
    and its ε is added to both variances, as the layer does when it normalizes; between moments ε is 0. What
    exceeds the range of float64 is inf.

    Args:
        live: Moments of the live data, 2 or more values in each channel.
        reference: Moments of the same kind, or the frozen layer that the live data go through.

    Raises:
        ValueError: A channel (named) has fewer than 2 values or statistics that are not finite, or the
            numbers of channels differ.
        TypeError: An argument is not as described.

    Example:
        >>> import batchnorm as bn
        >>> frozen = bn.FrozenBatchNorm(mean=[0.0, 1.0], var=[4.0, 1.0], eps=0)
        >>> live = bn.Moments(count=[101, 101], mean=[1.0, 1.0], m2=[400.0, 400.0])
        >>> shift(live, frozen).mean_shift.tolist()
        [0.5, 0.0]
        >>> shift(live, frozen).summary()["w2"]
        Summary(mean=0.75, max=1.0, channel=1)
    """
    if not isinstance(live, Moments):
        raise TypeError(f"live: was {type(live).__qualname__}, wanted Moments")
    mean, var, error = statistics("live", live)
    if isinstance(reference, FrozenBatchNorm):
        ref_mean, ref_var = reference.mean.astype(np.float64), reference.var.astype(np.float64)
        ref_error, eps = np.zeros(reference.channels), reference.eps
    elif isinstance(reference, Moments):
        (ref_mean, ref_var, ref_error), eps = statistics("reference", reference), 0.0
    else:
        raise TypeError(f"reference: was {type(reference).__qualname__}, wanted Moments or FrozenBatchNorm")
    if live.channels != reference.channels:
        raise ValueError(
            f"reference: was of {of_channels(reference.channels)}, wanted {live.channels} as in live"
        )

    difference = mean - ref_mean
    mean_shift = _quotient(difference, np.sqrt(ref_var + eps))
    # log1p keeps the digits of a small change, and the logarithms the range of a large one.
    change = (var - ref_var) / (ref_var + eps)
    ratio = np.where(np.abs(change) < 0.5, np.log1p(change), np.log(var + eps) - np.log(ref_var + eps))
    ratio[var == ref_var] = 0.0  # also where both are 0
    # r − 1 − ln r, which is 0 or more but for rounding; where it would be inf − inf, r is inf.
    excess = np.where(np.isposinf(ratio), np.inf, np.maximum(np.expm1(ratio) - ratio, 0.0))
    return Shift(
        mean_shift=mean_shift,
        log_variance_ratio=ratio,
        kl=(mean_shift**2 + excess) / 2,
        w2=np.hypot(mean_shift, np.expm1(ratio / 2)),
        z=_quotient(difference, np.hypot(error, ref_error)),
    )


def statistics(name: str, moments: Moments) -> tuple[_Floats, _Floats, _Floats]:
    """Return mean, unbiased variance and the standard error of the mean.

    Raises:
        ValueError: A channel (named) has fewer than 2 values or statistics that are not finite.
    """
    count, mean = moments.count, moments.mean
    if too_few := channels_where(count <= 1):
        raise ValueError(f"{name}: 2 values or more wanted in each channel, found {too_few} with fewer")
    var = moments.var_unbiased
    if bad := channels_where(~np.isfinite(mean) | ~np.isfinite(var)):
        raise ValueError(f"{name}: mean or variance is not finite in {bad}")
    return mean, var, np.sqrt(var) / np.sqrt(count)


def _quotient(difference: _Floats, scale: _Floats) -> _Floats:
    """Return difference/scale; where scale is 0, ±inf, or 0 if the difference is 0."""
    quotient = difference / scale
    quotient[difference == 0] = 0.0
    return quotient
