"""Whitening by its formulas, in plain NumPy float64: forward, and backward by the rules of matrix calculus.

`tests/test_whitening_gradients.py` proves the derivatives by finite differences. In the names, `d` before a
name is the derivative of the loss with respect to it: `dW` is ∂ℓ/∂W. Λ is `cov`, Λ + εI is `A`.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from oracle import long

METHODS = ("zca", "pca", "cholesky", "iterative")


def rows(x, channel_axis=1):
    """x as float64 (m, channels): one row for each example and position."""
    return np.moveaxis(np.asarray(x).astype(np.float64), channel_axis, -1).reshape(-1, x.shape[channel_axis])


def unrows(values, like, channel_axis=1):
    """The inverse of `rows`: values (m, channels) in the shape of `like`."""
    moved = np.moveaxis(np.empty(like.shape), channel_axis, -1).shape
    return np.moveaxis(values.reshape(moved), -1, channel_axis)


def covariance(x, groups=1, channel_axis=1, ddof=0):
    """Λ of each group in extended precision, (groups, D, D): Σ(x − μ)(x − μ)ᵀ/(m − ddof)."""
    c = long(rows(x, channel_axis))
    c = c - c.mean(0)
    c = c - c.mean(0)  # what the sum of large values has lost
    parts = np.split(c, groups, axis=1)
    return np.stack([part.T @ part for part in parts]) / (len(c) - ddof)


def eigh(A):
    """Eigenvalues descending and eigenvectors, each one's first entry of largest magnitude positive."""
    lam, U = np.linalg.eigh(A)
    lam, U = lam[::-1], U[:, ::-1]
    largest = U[np.argmax(abs(U), axis=0), np.arange(len(U))]
    return lam, U * np.sign(largest)


def newton_schulz(A, steps):
    """Every Y, Z of the coupled iteration on A/tr A: Y tends to its root, Z to the inverse of that root."""
    Y, Z = A / np.trace(A), np.eye(len(A))
    passed = [(Y, Z)]
    for _ in range(steps):
        M = (3 * np.eye(len(A)) - Z @ Y) / 2
        Y, Z = Y @ M, M @ Z
        passed.append((Y, Z))
    return passed


def whitening(A, method, steps=None):
    """W with W·A·Wᵀ = I."""
    if method == "zca":
        lam, U = np.linalg.eigh(A)
        return (U / np.sqrt(lam)) @ U.T
    if method == "pca":
        lam, U = eigh(A)
        return (U / np.sqrt(lam)).T
    if method == "cholesky":
        return np.linalg.inv(np.linalg.cholesky(A))
    return newton_schulz(A, steps)[-1][1] / np.sqrt(np.trace(A))


def whitening_backward(dW, A, method, steps=None):
    """dA, symmetric, from dW."""
    dA = {
        "zca": _zca_backward,
        "pca": _pca_backward,
        "cholesky": _cholesky_backward,
        "iterative": _iterative_backward,
    }[method](dW, A, steps)
    return (dA + dA.T) / 2


def _zca_backward(dW, A, _):
    lam, U = np.linalg.eigh(A)
    r = np.sqrt(lam)
    K = -1 / (np.outer(r, r) * (r[:, None] + r))
    return U @ (K * (U.T @ dW @ U)) @ U.T


def _pca_backward(dW, A, _):
    """By the derivatives of eigenvalues and eigenvectors: du_j = Σ_i u_i (u_iᵀ dA u_j)/(λ_j − λ_i)."""
    lam, U = eigh(A)
    dlam = -np.diagonal(dW @ U) / (2 * lam**1.5)
    dU = dW.T / np.sqrt(lam)
    gap = lam - lam[:, None]
    np.fill_diagonal(gap, 1)
    F = 1 / gap
    np.fill_diagonal(F, 0)
    return U @ (np.diag(dlam) + F * (U.T @ dU)) @ U.T


def _cholesky_backward(dW, A, _):
    """dL = −Wᵀ dW Wᵀ, and dA = L⁻ᵀ Φ(Lᵀ dL) L⁻¹: Φ keeps the lower triangle and half of the diagonal."""
    W = whitening(A, "cholesky")
    inner = np.tril(-dW @ W.T)
    inner[np.diag_indices_from(inner)] /= 2
    return W.T @ inner @ W


def _iterative_backward(dW, A, steps):
    """Back through the steps, and through the trace, which scales both ends."""
    trace, passed = np.trace(A), newton_schulz(A, steps)
    dtrace = -(dW * passed[-1][1]).sum() / (2 * trace**1.5)
    dY, dZ = np.zeros_like(A), dW / np.sqrt(trace)
    for Y, Z in reversed(passed[:-1]):
        M = (3 * np.eye(len(A)) - Z @ Y) / 2
        dM = Y.T @ dY + dZ @ Z.T
        dY, dZ = dY @ M.T - Z.T @ dM / 2, M.T @ dZ - dM @ Y.T / 2
    dtrace -= (dY * A).sum() / trace**2
    return dY / trace + dtrace * np.eye(len(A))


def ledoit_wolf(c):
    """δ, and δ's derivatives by Λ, (D, D), and by c, (m, D), of Ledoit and Wolf 2004, for centred rows c.

    Λ' = (1 − δ)Λ + δ·(tr Λ/D)·I with δ = b/d: d is the squared distance of Λ from (tr Λ/D)·I, and b, at most
    d, the mean square error of Λ, both divided by D.
    """
    m, D = c.shape
    cov, norms = c.T @ c / m, (c**2).sum(1)
    fourth, square, trace = (norms**2).sum(), (cov**2).sum(), np.trace(cov)
    b = (fourth / m - square) / (D * m)
    d = (square - trace**2 / D) / D
    if D == 1 or min(b, d) == 0 or b >= d:
        return float(D > 1 and min(b, d) != 0), np.zeros_like(cov), np.zeros_like(c)
    by_square = -1 / (D * m * d) - b / (d**2 * D)
    by_trace = 2 * b * trace / (D * d) ** 2
    by_fourth = 1 / (D * m**2 * d)
    return (
        b / d,
        2 * by_square * cov + by_trace * np.eye(D),
        by_fourth * 4 * norms[:, None] * c,
    )


def forward(
    x,
    gamma=1.0,
    beta=0.0,
    *,
    method="zca",
    groups=1,
    eps=1e-5,
    steps=None,
    shrinkage=None,
    channel_axis=1,
):
    """y = γ·W(x − μ) + β by the statistics of the batch, and all that `backward` needs."""
    r = rows(x, channel_axis)
    gamma, beta = (np.broadcast_to(np.asarray(p, np.float64), r.shape[1]) for p in (gamma, beta))
    centred = r - r.mean(0)
    parts = []
    for c in np.split(centred, groups, axis=1):
        cov, D = c.T @ c / len(c), c.shape[1]
        delta, by_cov, by_c = ledoit_wolf(c) if shrinkage else (0.0, np.zeros((D, D)), np.zeros_like(c))
        shrunk = (1 - delta) * cov + delta * np.trace(cov) / D * np.eye(D)
        A = shrunk + eps * np.eye(D)
        W = whitening(A, method, steps)
        parts.append(SimpleNamespace(c=c, cov=cov, delta=delta, by_cov=by_cov, by_c=by_c, A=A, W=W))
    xhat = np.concatenate([p.c @ p.W.T for p in parts], axis=1)
    y = unrows(gamma * xhat + beta, x, channel_axis)
    return SimpleNamespace(
        x=x,
        channel_axis=channel_axis,
        method=method,
        steps=steps,
        gamma=gamma,
        parts=parts,
        xhat=xhat,
        y=y,
        W=np.stack([p.W for p in parts]),
        A=np.stack([p.A for p in parts]),
    )


def backward(dy, f):
    """dx, dγ, dβ from what `forward` returned.

    With g = γ·dy: dW = Σ g cᵀ, dc = Wᵀg + (2/m)·dΛ·c, and dx = dc − mean(dc), as c = x − μ.
    """
    d = rows(dy, f.channel_axis)
    m, dx = len(d), []
    for g, p in zip(np.split(f.gamma * d, len(f.parts), axis=1), f.parts, strict=True):
        D = len(p.cov)
        dshrunk = whitening_backward(g.T @ p.c, p.A, f.method, f.steps)
        ddelta = (dshrunk * (np.trace(p.cov) / D * np.eye(D) - p.cov)).sum()
        dcov = (1 - p.delta) * dshrunk + p.delta * np.trace(dshrunk) / D * np.eye(D) + ddelta * p.by_cov
        dc = g @ p.W + 2 / m * p.c @ dcov + ddelta * p.by_c
        dx.append(dc - dc.mean(0))
    return unrows(np.concatenate(dx, axis=1), f.x, f.channel_axis), (d * f.xhat).sum(0), d.sum(0)


def residual(W, A):
    """The largest entry of |I − W·A·Wᵀ|."""
    return abs(np.eye(len(A)) - W @ A @ W.T).max()


def with_spectrum(rng, m, spectrum, mean=0.0):
    """Rows (m, D) whose Λ has exactly (to rounding) these eigenvalues, in random directions."""
    D = len(spectrum)
    c = rng.standard_normal((m, D))
    c -= c.mean(0)
    columns, _ = np.linalg.qr(c)  # orthonormal, and their means stay zero
    directions, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return columns * np.sqrt(m * np.asarray(spectrum)) @ directions.T + mean
