"""Batch normalization as the paper writes it, in extended precision, and, bit for bit, as contract 1 does.

Ioffe and Szegedy 2015; so simple that it needs no test. Per-channel values keep x's rank, with length 1 on
every axis but the channels'.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

LONG = np.longdouble
if np.finfo(LONG).nmant < 63:
    raise RuntimeError("the oracle needs a long double of 64 or more significant bits (x86, or Linux on ARM)")


def long(a):
    """Any real array in extended precision, exactly: float64 holds every value of the narrower dtypes."""
    return np.asarray(a).astype(np.float64).astype(LONG)


def along(p, x, channel_axis):
    """(channels,) parameters, or a scalar, shaped to stand beside x; dtype kept."""
    shape = [1] * x.ndim
    shape[channel_axis] = x.shape[channel_axis]
    return np.broadcast_to(np.asarray(p), (x.shape[channel_axis],)).reshape(shape)


def total(a, axes):
    """Σ over `axes`, which stay with length 1: in runs of a channel, so that NumPy adds pairwise."""
    kept = [k for k in range(a.ndim) if k not in axes]
    runs = np.ascontiguousarray(a.transpose(*kept, *axes)).reshape([a.shape[k] for k in kept] + [-1])
    return np.expand_dims(runs.sum(-1), axes)


def forward(x, gamma, beta, eps, channel_axis=1, population=None):
    """Algorithm 1; with `population` = (E[x], Var[x]), the inference of Algorithm 2."""
    axes = tuple(k for k in range(x.ndim) if k != channel_axis % x.ndim)
    gamma, beta = (along(long(p), x, channel_axis) for p in (gamma, beta))
    m = x.size // x.shape[channel_axis]
    x, eps = long(x), LONG(eps)
    if population is None:
        mu = total(x, axes) / m
        mu += total(x - mu, axes) / m  # what the sum of large values has lost
        sigma2 = total((x - mu) ** 2, axes) / m
    else:
        mu, sigma2 = (along(long(p), x, channel_axis) for p in population)
    xhat = (x - mu) / np.sqrt(sigma2 + eps)
    y = gamma * xhat + beta
    return SimpleNamespace(
        axes=axes, m=m, x=x, mu=mu, sigma2=sigma2, eps=eps, gamma=gamma, beta=beta, xhat=xhat, y=y
    )


def backward(dy, f):
    """Section 3: the six derivatives of the loss, one by one, from what `forward` returned."""
    dy = long(dy)
    root = np.sqrt(f.sigma2 + f.eps)
    dxhat = dy * f.gamma
    dsigma2 = total(dxhat * (f.x - f.mu), f.axes) * -0.5 / root**3
    dmu = total(-dxhat / root, f.axes) + dsigma2 * total(-2 * (f.x - f.mu), f.axes) / f.m
    dx = dxhat / root + dsigma2 * 2 * (f.x - f.mu) / f.m + dmu / f.m
    return dx, total(dy * f.xhat, f.axes).squeeze(f.axes), total(dy, f.axes).squeeze(f.axes)


def infer(x, mean, var, gamma=1.0, beta=0.0, eps=1e-5, channel_axis=1, activation=None, residual=None):
    """Contract 1: in float64, or for 16-bit tensors in float32 with a high and a low mean; so all of it."""
    wide = np.dtype(np.float32 if x.dtype.itemsize == 2 else np.float64)
    mean, var, gamma, beta = (
        along(np.asarray(p, np.float64), x, channel_axis) for p in (mean, var, gamma, beta)
    )
    with np.errstate(all="ignore"):
        s = (gamma / np.sqrt(var + eps)).astype(wide)
        hi = mean.astype(wide)
        centred = x.astype(wide) - hi
        if x.dtype.itemsize == 2:
            centred -= (mean - hi).astype(wide)
        y = centred * s + beta.astype(wide)
        if residual is not None:
            y = y + residual.astype(wide)
        if activation is not None:
            y = np.where(y <= 0, wide.type(0), y)
        if activation == "relu6":
            y = np.where(y > 6, wide.type(6), y)
        return y.astype(x.dtype)


def whiten(x, matrix, mean, bias, channel_axis=1):
    """A frozen whitening layer: Σ_i matrix[o, i]·(x_i − mean_i) + bias_o in order of i, in float64."""
    channels, size = matrix.shape
    matrix, mean, bias = (np.asarray(p, np.float64) for p in (matrix, mean, bias))
    by_channel = np.moveaxis(x, channel_axis, 0).astype(np.float64)
    y = np.empty(by_channel.shape)
    with np.errstate(all="ignore"):
        for o in range(channels):
            first = o - o % size
            y[o] = 0.0
            for i in range(size):
                y[o] += matrix[o, i] * (by_channel[first + i] - mean[first + i])
            y[o] += bias[o]
        if x.dtype.itemsize == 2:
            y = y.astype(np.float32)
        return np.moveaxis(y.astype(x.dtype), 0, channel_axis)


def whiten_backward(dy, matrix, channel_axis=1):
    """dx of a frozen whitening layer: Σ_o matrix[o, i]·dy_o in order of o, in float64."""
    channels, size = matrix.shape
    transposed = matrix.reshape(-1, size, size).swapaxes(1, 2).reshape(channels, size)
    return whiten(dy, transposed, np.zeros(channels), np.zeros(channels), channel_axis)


def ulp(s, dtype):
    """The distance of neighbouring numbers of `dtype` at |s|, in extended precision."""
    digits, least = {
        "float16": (10, -14),
        "bfloat16": (7, -126),
        "float32": (23, -126),
        "float64": (52, -1022),
    }[dtype.name]
    return np.ldexp(LONG(1), np.maximum(np.frexp(s)[1] - 1, least) - digits)


def size(f):
    """Contract 2's S."""
    if hasattr(f, "size"):
        return f.size
    return np.maximum(np.maximum(abs(f.gamma * f.xhat), abs(f.beta)), abs(f.y))


def followed(f, activation=None, residual=None):
    """`f` with a residual and an activation after it; S counts |residual|."""
    residual = long(0.0 if residual is None else residual)
    v = f.y + residual
    y = {None: v, "relu": np.maximum(v, 0), "relu6": np.clip(v, 0, 6)}[activation]
    return SimpleNamespace(
        **vars(f) | {"y": y, "size": np.maximum(np.maximum(size(f), abs(residual)), abs(y))}
    )


def share_of_bound(y, f, *, trained):
    """The worst error of y against `f` as a share of what contract 2 allows."""
    s, kappa = size(f), abs(f.mu) / np.sqrt(f.sigma2 + f.eps)
    if y.dtype == np.float64:
        allowed = LONG(2) ** -49 * (4 + kappa) * np.maximum(s, abs(f.gamma))
    else:
        allowed = ulp(s, y.dtype) + trained * LONG(2) ** -49 * kappa * abs(f.gamma)
    return float((abs(long(y) - f.y) / allowed).max())


def error_in_ulps(y, f):
    """The worst error of y against `f` in ulps of its dtype at S; in float64 at γ where that is more."""
    s = np.maximum(size(f), abs(f.gamma)) if y.dtype == np.float64 else size(f)
    return float((abs(long(y) - f.y) / ulp(s, y.dtype)).max())


def gradient_errors(got, dy, f, *, trained):
    """The worst errors of the gradients `got` against `f`, by name: (in units, as a share of the bound).

    dx counts in ulps of its dtype at the sum of the magnitudes of its terms, dγ in 2⁻⁵³ of Σ|dy|(|x̂|+1), dβ
    in 2⁻⁵³ of Σ|dy|. The bound of both, and of dx in float64, is 2⁻⁴⁹(4 + κ) of what does not cancel; dx in
    16 and 32 bits may round by one ulp more.
    """
    exact = backward(dy, f)
    dy, axes, dtype = long(dy), f.axes, got.dx.dtype
    root = np.sqrt(f.sigma2 + f.eps)
    relative = LONG(2) ** -49 * (4 + abs(f.mu) / root)
    sums = [np.expand_dims(a, axes) for a in exact[1:]]
    whole = [total(abs(a), axes) for a in (dy * f.xhat, dy)]
    if trained:
        dx = exact[0]
        largest, size = (
            abs(f.gamma) / root * (abs(dy) + (abs(dbeta) + abs(f.xhat) * abs(dgamma)) / f.m)
            for dgamma, dbeta in (sums, whole)
        )
    else:
        dx = f.gamma / root * dy
        largest = size = abs(dx)
    error = abs(long(got.dx) - dx)
    unit = ulp(size if dtype == np.float64 else largest, dtype)
    allowed = relative * size + (0 if dtype == np.float64 else unit)
    errors = {"dx": (float((error / unit).max()), float((error / allowed).max()))}
    weights = (whole[0] + whole[1], whole[1])
    for name, ours, judge, weight in zip(("dgamma", "dbeta"), got[1:], sums, weights, strict=True):
        error = abs(np.expand_dims(long(ours), axes) - judge) / weight
        errors[name] = (float(error.max() * LONG(2) ** 53), float((error / relative).max()))
    return errors
