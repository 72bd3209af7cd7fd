"""Cases computed by PyTorch (tests/data/torch_batch_norm.npz): forward, running statistics, gradients."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn

with np.load(Path(__file__).parent / "data/torch_batch_norm.npz") as stored:
    ARRAYS = dict(stored)
CASES = json.loads(ARRAYS["manifest"].tobytes())["cases"]

# PyTorch computes 32 and 16-bit tensors in float32: some of its last places, or one of a 16-bit dtype.
TOLERANCE = {"float32": 2e-5, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture(params=CASES, ids=lambda c: f"{c['key']} {c['name']}")
def case(request):
    c = SimpleNamespace(**request.param, weight=None, bias=None)
    for name, array in ARRAYS.items():
        key, _, field = name.partition("/")
        if key == c.key:
            setattr(c, field, array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array)
    return c


def close(ours, theirs, dtype):
    a, b = (np.asarray(v).astype(np.float64) for v in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1, abs(b).max()))


def test_forward_and_gradients(case):
    assert case.x.dtype.name == case.dtype
    if case.training:
        y, cache = bn.train_forward(case.x, case.weight, case.bias, eps=case.eps)
        gradients = bn.backward(case.dy, cache)
    else:
        statistics = case.running_mean, case.running_var
        y = bn.infer(case.x, *statistics, case.weight, case.bias, eps=case.eps)
        gradients = bn.infer_backward(case.dy, case.x, *statistics, case.weight, eps=case.eps)
    close(y, case.y, case.dtype)
    close(gradients.dx, case.dx, case.dtype)
    if case.affine:
        close(gradients.dgamma, case.dweight, case.dtype)
        close(gradients.dbeta, case.dbias, case.dtype)


def test_running_statistics(case):
    """PyTorch's `momentum` is our `update_weight`; the variance it stores is unbiased."""
    m = bn.moments(case.x)
    mean, var = (np.asarray(a, np.float64) for a in (case.running_mean, case.running_var))
    if case.training:
        for _ in range(case.steps):
            mean = (1 - case.momentum) * mean + case.momentum * m.mean
            var = (1 - case.momentum) * var + case.momentum * m.var_unbiased
    tolerance = 1e-13 if case.param_dtype == "float64" else 2e-6
    np.testing.assert_allclose(mean, case.running_mean_after, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(var, case.running_var_after, rtol=tolerance)


def test_every_kind_of_case_is_there():
    assert len(CASES) == 40
    kinds = {(c["dtype"], c["training"]) for c in CASES}
    assert kinds == {(d, t) for d in TOLERANCE for t in (False, True)}
    assert {c["affine"] for c in CASES} == {False, True}
