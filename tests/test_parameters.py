"""Per-channel parameters in every kind of memory: each works, or raises an error that names it."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm._core import Coefficients

VALUES = np.array([1.0, 2.0, 3.0])
X = np.arange(12, dtype=np.float32).reshape(4, 3)


def packed(dtype):
    """A field of packed records: its stride is not a multiple of its size, and it is misaligned."""
    records = np.zeros(3, [("w", "i1"), ("v", dtype), ("z", "i2")])
    records["v"] = VALUES
    return records["v"]


def misaligned(dtype):
    array = np.zeros(3 * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype)
    array[:] = VALUES
    assert not array.flags.aligned
    return array


MEMORY = {
    "packed": packed,
    "misaligned": misaligned,
    "strided": lambda dtype: np.repeat(VALUES, 2).astype(dtype)[::2],
    "reversed": lambda dtype: VALUES[::-1].astype(dtype)[::-1],
    "big-endian": lambda dtype: VALUES.astype(np.dtype(dtype).newbyteorder(">")),
    "read-only": lambda dtype: np.frombuffer(VALUES.astype(dtype).tobytes(), dtype),
    "list": lambda dtype: VALUES.tolist(),
    "int": lambda dtype: VALUES.astype(int),
}


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("memory", MEMORY)
def test_parameters_in_any_memory(memory, dtype):
    given = MEMORY[memory](dtype)
    wanted = bn.infer(X, VALUES, VALUES, VALUES, VALUES)
    assert np.array_equal(bn.infer(X, given, given, given, given), wanted)
    assert np.array_equal(Coefficients(given, given, given, given).infer(X), wanted)
    assert np.array_equal(bn.FrozenBatchNorm(given, given, given, given).mean, VALUES)
    assert np.array_equal(bn.Moments(given, given, given).mean, VALUES)
    y, _ = bn.train_forward(X, given, given)
    assert np.array_equal(y, bn.train_forward(X, VALUES, VALUES)[0])


@pytest.mark.parametrize("name", ["mean", "var", "gamma", "beta"])
def test_a_mask_is_not_lost_in_silence(name):
    masked = np.ma.masked_array(VALUES, [False, True, False])
    parameters = {"mean": VALUES, "var": VALUES, "gamma": VALUES, "beta": VALUES} | {name: masked}
    for take in (Coefficients, bn.FrozenBatchNorm, lambda **p: bn.infer(X, **p)):
        with pytest.raises(TypeError, match=f"^{name} is .*MaskedArray with a mask; wanted"):
            take(**parameters)


def test_a_masked_out_is_refused():
    out = np.ma.masked_array(np.zeros_like(X), True)
    with pytest.raises(TypeError, match=r"^out is .*MaskedArray with a mask; wanted"):
        bn.infer(X, VALUES, VALUES, out=out)
    assert not out.data.any()
