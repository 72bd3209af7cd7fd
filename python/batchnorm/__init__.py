"""Batch normalization for CPUs after Ioffe and Szegedy 2015 (arXiv 1502.03167).

Functions: `train_forward` and `backward`, `infer` and `infer_backward`. `train_forward` is `moments`, then
`normalize`; `backward` is `gradient_sums`, then `gradient_apply`. Layers: `BatchNorm` trains;
`FrozenBatchNorm` and `FrozenWhitening` are saved, exported and served. `set_num_threads`,
`set_thread_source`, `set_simd_level` and `release_memory` change how long calls take, but not a bit of their
results.
"""

from __future__ import annotations

from batchnorm._core import (
    Cache,
    CoMoments,
    GradientSums,
    Moments,
    __version__,
    backward,
    comoments,
    get_num_threads,
    get_thread_source,
    gradient_apply,
    gradient_sums,
    infer,
    infer_backward,
    moments,
    normalize,
    release_memory,
    set_num_threads,
    set_simd_level,
    set_thread_source,
    simd_level,
    simd_levels,
    train_forward,
    whiten_backward,
    whiten_forward,
    whitening_matrix,
)
from batchnorm._types import Gradients
from batchnorm.covariance import MovingCovariance, PooledCovariance
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.frozen_whitening import FrozenWhitening
from batchnorm.layer import BatchNorm
from batchnorm.population import Algorithm2, MovingAverage
from batchnorm.whitening import Whitening

__all__ = [
    "Algorithm2",
    "BatchNorm",
    "Cache",
    "CoMoments",
    "FrozenBatchNorm",
    "FrozenWhitening",
    "GradientSums",
    "Gradients",
    "Moments",
    "MovingAverage",
    "MovingCovariance",
    "PooledCovariance",
    "Whitening",
    "__version__",
    "backward",
    "comoments",
    "get_num_threads",
    "get_thread_source",
    "gradient_apply",
    "gradient_sums",
    "infer",
    "infer_backward",
    "moments",
    "normalize",
    "release_memory",
    "set_num_threads",
    "set_simd_level",
    "set_thread_source",
    "simd_level",
    "simd_levels",
    "train_forward",
    "whiten_backward",
    "whiten_forward",
    "whitening_matrix",
]
