"""FrozenBatchNorm.from_torch against what PyTorch's layers computed (tests/data/torch_batch_norm.npz)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "torch_batch_norm.npz"))
CASES = json.loads(GOLDEN["manifest"].tobytes().decode())["cases"]
EVAL = [case for case in CASES if not case["training"]]
HALF_ULP = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def tensor(case, name):
    values = GOLDEN[f"{case['key']}/{name}"]
    return values.view(ml_dtypes.bfloat16) if values.dtype == np.uint16 else values


def test_there_are_cases_of_every_kind():
    assert len(EVAL) == len(CASES) // 2 == 20
    assert {case["dtype"] for case in EVAL} == set(HALF_ULP)
    assert {case["affine"] for case in EVAL} == {True, False}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_parameters_arrive_unchanged(case):
    frozen = bn.FrozenBatchNorm.from_torch(GOLDEN, f"{case['key']}/", eps=case["eps"])
    channels = case["shape"][1]
    assert (frozen.channels, frozen.channel_axis) == (channels, 1)
    assert (frozen.dtype, frozen.eps) == (case["param_dtype"], float(np.float32(case["eps"])))
    assert frozen.mean.tolist() == tensor(case, "running_mean").tolist()
    assert frozen.var.tolist() == tensor(case, "running_var").tolist()
    assert frozen.gamma.tolist() == (tensor(case, "weight").tolist() if case["affine"] else [1] * channels)
    assert frozen.beta.tolist() == (tensor(case, "bias").tolist() if case["affine"] else [0] * channels)


@pytest.mark.parametrize("case", EVAL, ids=lambda case: case["name"])
def test_it_computes_what_pytorch_computed(case):
    """Its x·s + t is in the precision of the parameters, then both round to x's; and its ε is a float64."""
    frozen = bn.FrozenBatchNorm.from_torch(GOLDEN, f"{case['key']}/", eps=case["eps"])
    x, y, dy, dx = (tensor(case, name) for name in ("x", "y", "dy", "dx"))
    by_channel = (-1, *[1] * (x.ndim - 2))
    mean, var, gamma, beta = (
        p.astype(np.float64).reshape(by_channel) for p in (frozen.mean, frozen.var, frozen.gamma, frozen.beta)
    )
    sigma = np.sqrt(var + frozen.eps)
    other_eps = abs(frozen.eps - case["eps"]) / sigma**2

    def agree(ours, theirs, size, roundings=8, other_eps=other_eps):
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        bound = (roundings * HALF_ULP[case["param_dtype"]] + other_eps) * size
        bound += 2 * HALF_ULP[case["dtype"]] * np.abs(theirs)
        assert np.all(np.abs(ours - theirs) <= bound)

    from_mean = np.abs(x.astype(np.float64)) + np.abs(mean)
    agree(frozen(x), y, np.abs(gamma) / sigma * from_mean + np.abs(beta))
    gradients = frozen.backward(dy, x)
    abs_dy = np.abs(dy.astype(np.float64))
    agree(gradients.dx, dx, np.abs(gamma) / sigma * abs_dy)
    if case["affine"]:
        rest = tuple(k for k in range(x.ndim) if k != 1)
        agree(gradients.dbeta, tensor(case, "dbias"), abs_dy.sum(rest), x.size, 0)
        summed = (abs_dy * from_mean / sigma).sum(rest)
        agree(gradients.dgamma, tensor(case, "dweight"), summed, x.size, other_eps.ravel())


STATE = {"bn1.running_mean": np.zeros(2), "bn1.running_var": np.ones(2), "bn1.num_batches_tracked": 3}


def test_eps_is_pytorchs_default():
    assert bn.FrozenBatchNorm.from_torch(STATE, "bn1.") == bn.FrozenBatchNorm([0, 0], [1, 1], dtype="float64")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_narrower_states_make_float32_layers(dtype):
    state = {key: np.asarray(values, dtype) for key, values in STATE.items()}
    assert bn.FrozenBatchNorm.from_torch(state, "bn1.").dtype == np.float32


def test_weight_and_bias_are_each_optional():
    weighted = bn.FrozenBatchNorm.from_torch(STATE | {"bn1.weight": [2.0, 3.0]}, "bn1.")
    assert (weighted.gamma.tolist(), weighted.beta.tolist()) == ([2, 3], [0, 0])
    biased = bn.FrozenBatchNorm.from_torch(STATE | {"bn1.bias": [2.0, 3.0], "bn1.weight": None}, "bn1.")
    assert (biased.gamma.tolist(), biased.beta.tolist()) == ([1, 1], [2, 3])


class Tensor:
    """All that is needed of a tensor."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_tensors_are_read_through_array():
    tensors = {key: Tensor(values) for key, values in STATE.items()}
    assert bn.FrozenBatchNorm.from_torch(tensors, "bn1.") == bn.FrozenBatchNorm.from_torch(STATE, "bn1.")


def test_a_wrong_prefix_is_told_what_there_is():
    with pytest.raises(ValueError, match=r"'running_mean' and 'running_var' wanted \(prefix ''\), but it"):
        bn.FrozenBatchNorm.from_torch(STATE)
    without = {"bn1.running_mean": np.zeros(2)} | {f"fc.{k}": np.zeros(2) for k in range(100)}
    with pytest.raises(ValueError, match=r"state_dict: 'bn1.running_var' wanted .*'fc.10' and 89 more$"):
        bn.FrozenBatchNorm.from_torch(without, "bn1.")
    with pytest.raises(ValueError, match="it has no keys at all"):
        bn.FrozenBatchNorm.from_torch({})


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="gamma"):
        bn.FrozenBatchNorm.from_torch(STATE | {"bn1.weight": np.ones(3)}, "bn1.")


def test_pytorch_is_not_needed():
    code = """
import sys
sys.modules["torch"] = None
import batchnorm as bn
assert bn.FrozenBatchNorm.from_torch({"running_mean": [0.0], "running_var": [1.0]}).channels == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)
