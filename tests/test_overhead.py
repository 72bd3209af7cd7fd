"""The overhead of a call with almost nothing to compute, in units of NumPy's smallest call."""

from functools import partial

import numpy as np

import batchnorm as bn
from timing import medians


def test_small_calls_cost_a_few_additions():
    """The goals as they stand; the best of three tries, since other processes come and go."""
    x, pair = (np.arange(n * 64, dtype=np.float32).reshape(n, 64) for n in (1, 2))
    mean, var, gamma, beta = (np.ones(64, np.float32) for _ in range(4))
    y, two = np.empty_like(x), np.empty_like(pair)
    most = {"infer": 6, "frozen": 6, "train_forward": 12}
    ratios = dict.fromkeys(most, np.inf)
    for _ in range(3):
        times = medians(
            {
                "add": partial(np.add, x, x, out=y),
                "infer": partial(bn.infer, x, mean, var, gamma, beta, out=y),
                "frozen": partial(bn.FrozenBatchNorm(mean, var, gamma, beta), x, y),
                "train_forward": partial(bn.train_forward, pair, gamma, beta, out=two),
            },
            repeat=500,
        )
        ratios = {name: min(ratio, times[name] / times["add"]) for name, ratio in ratios.items()}
        if all(ratios[name] <= most[name] for name in most):
            break
    assert all(ratios[name] <= most[name] for name in most), ratios
