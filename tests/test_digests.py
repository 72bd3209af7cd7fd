"""The bits of seeded inputs, as committed digests: what changes a bit changes this table.

Inference never changes. Statistics, training and gradients change only with a new `kernels` version in the
table and a line in CHANGELOG.md. Run this file as a script to print the table anew.
"""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn

TABLE = Path(__file__).parent / "data" / "digests.json"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
SHAPES = [
    ((33, 5), 1),
    ((700, 40), 1),
    ((3, 4, 5), 1),
    ((9, 17, 7, 7), 1),
    ((2, 3, 65, 70), 1),
    ((6, 5, 5, 20), -1),
]


def numbers(shape, seed):
    """Reproducible noise from integers alone, whatever NumPy's generators do: a splitmix64 of the index."""
    with np.errstate(over="ignore"):
        z = np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            seed
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1).reshape(shape)


def digests(dtype, shape, axis):
    x = (numbers(shape, 1) * 2 + 3).astype(dtype)
    dy = numbers(shape, 2).astype(dtype)
    channels = shape[axis]
    gamma, beta, mean, var = (numbers(channels, seed) for seed in (3, 4, 5, 6))
    y, cache = bn.train_forward(x, gamma, beta, channel_axis=axis)
    moments, gradients = cache.moments, bn.backward(dy, cache)
    results = {
        "infer": [bn.infer(x, mean, var + 2, gamma, beta, channel_axis=axis)],
        "moments": [moments.count, moments.mean, moments.m2],
        "train_forward": [y],
        "backward": list(gradients),
    }
    return {
        name: hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:32]
        for name, arrays in results.items()
    }


def table():
    return {
        f"{name} {'x'.join(map(str, shape))} axis {axis}": digests(dtype, shape, axis)
        for name, dtype in DTYPES.items()
        for shape, axis in SHAPES
    }


@pytest.mark.parametrize("level", bn.simd_levels())
def test_digests(level):
    committed = json.loads(TABLE.read_text())
    bn.set_simd_level(level)
    try:
        assert table() == committed["digests"]
    finally:
        bn.set_simd_level(None)
    assert len(committed["digests"]) == len(DTYPES) * len(SHAPES)


def test_the_version_of_the_kernels_is_in_the_changelog():
    version = json.loads(TABLE.read_text())["kernels"]
    assert f"kernels {version}" in (TABLE.parents[2] / "CHANGELOG.md").read_text()


if __name__ == "__main__":
    print(json.dumps({"kernels": json.loads(TABLE.read_text())["kernels"], "digests": table()}, indent=1))
