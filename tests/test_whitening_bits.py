"""Whitening's bits: for any number of threads on one machine, and of eval mode for any split of a batch.

Between CPU types training whitening is only promised to be as accurate as tests/test_whitening.py says.
"""

from __future__ import annotations

import numpy as np
import pytest

import batchnorm as bn
import cases
import whitening_oracle as theory

LAYOUTS = (
    cases.Layout((3000, 64)),
    cases.Layout((300, 120)),
    cases.Layout((7, 24, 31, 33)),
    cases.Layout((7, 31, 33, 24), channel_axis=-1),
    cases.Layout((7, 24, 31, 33), memory=cases.NHWC_AS_NCHW),
    cases.Layout((3, 36, 7001)),
)


def results(x, dy, layout, method, groups, shrinkage):
    """The bits of everything that a training step and a frozen layer use."""
    axis = {"channel_axis": layout.channel_axis}
    gamma = np.linspace(0.5, 2, layout.channels)
    s = bn.comoments(x, groups=groups, **axis)
    y, cache = bn.whiten_forward(
        x, gamma, gamma, method=method, groups=groups, eps=1e-3, shrinkage=shrinkage, **axis
    )
    W = bn.whitening_matrix(s.cov, method=method, eps=1e-3)
    return [cases.bits(a) for a in (s.mean, s.scatter, y, cache.matrix, W, *bn.whiten_backward(dy, cache))]


@pytest.mark.usefixtures("restore_execution")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("method", theory.METHODS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_number_of_threads(rng, layout, method, groups):
    for dtype in cases.DTYPES[:2]:
        x = layout.normal(rng, dtype, 1.0, np.linspace(1, 5, layout.channels))
        dy = layout.normal(rng, dtype)
        for level in bn.simd_levels():
            bn.set_simd_level(level)
            seen = []
            for threads in (1, 2, 4, 4):
                bn.set_num_threads(threads)
                seen.append(results(x, dy, layout, method, groups, None))
            assert len(seen[0]) == 8
            assert seen[1:] == seen[:1] * 3, f"{dtype} at level {level}"


@pytest.mark.usefixtures("restore_execution")
def test_any_number_of_threads_with_shrinkage(rng):
    layout = LAYOUTS[3]
    x, dy = layout.normal(rng, np.float64, 1.0, 2.0), layout.normal(rng, np.float64)
    seen = []
    for threads in (1, 2, 4):
        bn.set_num_threads(threads)
        seen.append(results(x, dy, layout, "zca", 2, "ledoit-wolf"))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] != results(x, dy, layout, "zca", 2, None)


@pytest.mark.usefixtures("restore_execution")
def test_eval_mode_for_any_split_level_and_threads(rng, dtype):
    """The frozen layer sums in a fixed order for each output, whatever is beside it."""
    wide = "float64" if dtype == np.float64 else "float32"
    layer = bn.Whitening(24, groups=2, dtype=wide)
    x = cases.Layout((40, 24, 5)).normal(rng, dtype, 2.0, 3.0)
    layer(x)
    layer.eval()
    seen = set()
    for level in bn.simd_levels():
        bn.set_simd_level(level)
        for threads in (1, 2):
            bn.set_num_threads(threads)
            for cuts in ([], [1, 17], [39]):
                seen.add(cases.bits(np.concatenate([layer(part) for part in np.split(x, cuts)])))
    assert len(seen) == 1
