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


def forward(x, gamma, beta, eps, channel_axis=1, population=None):
    """Algorithm 1; with `population` = (E[x], Var[x]), the inference of Algorithm 2."""
    axes = tuple(k for k in range(x.ndim) if k != channel_axis % x.ndim)
    gamma, beta = (along(long(p), x, channel_axis) for p in (gamma, beta))
    m = x.size // x.shape[channel_axis]
    x, eps = long(x), LONG(eps)
    if population is None:
        mu = x.sum(axes, keepdims=True) / m
        sigma2 = ((x - mu) ** 2).sum(axes, keepdims=True) / m
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
    dsigma2 = (dxhat * (f.x - f.mu)).sum(f.axes, keepdims=True) * -0.5 / root**3
    dmu = (-dxhat / root).sum(f.axes, keepdims=True) + dsigma2 * (-2 * (f.x - f.mu)).sum(
        f.axes, keepdims=True
    ) / f.m
    dx = dxhat / root + dsigma2 * 2 * (f.x - f.mu) / f.m + dmu / f.m
    return dx, (dy * f.xhat).sum(f.axes), dy.sum(f.axes)


def infer(x, mean, var, gamma=1.0, beta=0.0, eps=1e-5, channel_axis=1):
    """Contract 1: in float64, or for 16-bit tensors in float32 with a high and a low mean."""
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
        return (centred * s + beta.astype(wide)).astype(x.dtype)


def ulp(s, dtype):
    """The distance of neighbouring numbers of `dtype` at |s|, in extended precision."""
    digits, least = {
        "float16": (10, -14),
        "bfloat16": (7, -126),
        "float32": (23, -126),
        "float64": (52, -1022),
    }[dtype.name]
    return np.ldexp(LONG(1), np.maximum(np.frexp(s)[1] - 1, least) - digits)


def share_of_bound(y, f, *, trained):
    """The worst error of y against `f` as a share of what contract 2 allows."""
    s = np.maximum(np.maximum(abs(f.gamma * f.xhat), abs(f.beta)), abs(f.y))
    kappa = abs(f.mu) / np.sqrt(f.sigma2 + f.eps)
    if y.dtype == np.float64:
        allowed = LONG(2) ** -49 * (4 + kappa) * np.maximum(s, abs(f.gamma))
    else:
        allowed = ulp(s, y.dtype) + trained * LONG(2) ** -49 * kappa * abs(f.gamma)
    return float((abs(long(y) - f.y) / allowed).max())


def error_in_ulps(y, f):
    """The worst error of y against `f` in ulps of its dtype at S; in float64 at γ where that is more."""
    s = np.maximum(np.maximum(abs(f.gamma * f.xhat), abs(f.beta)), abs(f.y))
    if y.dtype == np.float64:
        s = np.maximum(s, abs(f.gamma))
    return float((abs(long(y) - f.y) / ulp(s, y.dtype)).max())
