"""Covariance, its inverse root and the product with x, against NumPy and scikit-learn, all in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

import batchnorm as bn
from bench.special import Record, record
from bench.timing import medians
from bench_whitening.costs import correlated
from bench_whitening.rows import LIMIT, REST, ROWS_PER_CHANNEL

Array = NDArray[np.float64]
GROUP = "covariance, root, product"


class DifferentError(Exception):
    """Somebody's answer is not white; the message says whose."""


def numpy_zca(x: Array) -> Array:
    """Whiten as one writes it in NumPy."""
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False, bias=True))
    return (x - x.mean(axis=0)) @ ((vectors / np.sqrt(values)) @ vectors.T)


def sklearn_pca(x: Array) -> Array:
    """Principal components with variance one, by the solver that has the same steps."""
    return PCA(whiten=True, svd_solver="covariance_eigh").fit_transform(x)


def ours(method: str) -> Callable[[Array], Array]:
    """Our forward pass."""
    return lambda x: bn.whiten_forward(x, method=method, eps=0)[0]


PAIRS: dict[str, dict[str, Callable[[Array], Array]]] = {
    "zca": {"ours": ours("zca"), "NumPy": numpy_zca},
    "pca": {"ours": ours("pca"), "scikit-learn": sklearn_pca},
}


def compare(size: int, rounds: int, told: Callable[[str], object]) -> list[Record]:
    """One record for each peer.

    Raises:
        DifferentError: An answer is not white.
    """
    rows = ROWS_PER_CHANNEL * size
    x = correlated(rows, size, np.float64)
    records = []
    for method, contenders in PAIRS.items():
        told(f"D = {size}: {method} against {', '.join(contenders)}")
        calls: dict[str, Callable[[], Any]] = {}
        for name, whiten in contenders.items():
            off = abs(np.cov(whiten(x), rowvar=False, bias=True) - np.eye(size)).max()
            if not off < 2 / rows:  # scikit-learn divides by the number of rows less one
                raise DifferentError(f"D = {size}: the covariance by {name} is off by {off:.2g}")
            calls[name] = lambda whiten=whiten: whiten(x)
        ms = {name: median.ms for name, median in medians(calls, rounds, rest=REST).items()}
        peer = next(name for name in contenders if name != "ours")
        ratio = ms["ours"] / ms[peer]
        unit = (1e-3, " s") if ms["ours"] >= 1e3 else (1, "")
        records.append(record(GROUP, f"NC {rows}x{size} float64", method, ms, ratio, LIMIT, unit=unit))
    return records
