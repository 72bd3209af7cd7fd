"""NumPy's two-pass expression, as one writes it: mean, then deviations and their mean square."""

from __future__ import annotations

import numpy as np

from bench.case import EPS, Call, Case
from bench.rows import BACKWARD, FORWARD, INFERENCE


def version() -> str:
    return np.__version__


def calls(case: Case, threads: int) -> dict[str, Call]:
    """In the tensor's dtype, with `out=` where that saves memory; 16-bit arithmetic would be in software."""
    if case.narrow:
        return {}
    x, dy, out = (case.rows(a) for a in (case.x, case.dy, case.out))
    gamma, beta, mean, var = (case.beside(p) for p in (case.gamma, case.beta, case.mean, case.var))
    axes, eps = case.reduced, case.gamma.dtype.type(EPS)
    mu = x.mean(axis=axes, keepdims=True)
    invstd = 1 / np.sqrt(x.var(axis=axes, keepdims=True) + eps)

    def forward():
        mu = x.mean(axis=axes, keepdims=True)
        np.subtract(x, mu, out=out)
        var = np.mean(out * out, axis=axes, keepdims=True)
        np.multiply(out, gamma / np.sqrt(var + eps), out=out)
        return np.add(out, beta, out=out)

    def infer():
        np.subtract(x, mean, out=out)
        np.multiply(out, gamma / np.sqrt(var + eps), out=out)
        return np.add(out, beta, out=out)

    def backward():
        xhat = (x - mu) * invstd
        dbeta = dy.mean(axis=axes, keepdims=True)
        dgamma = (dy * xhat).mean(axis=axes, keepdims=True)
        return np.multiply(dy - dbeta - xhat * dgamma, gamma * invstd, out=out)

    return {FORWARD: forward, INFERENCE: infer, BACKWARD: backward}
