"""Conversion of state from other frameworks' conventions to ours; no other module does it.

Frameworks agree on the arithmetic of batch normalization, but differ in how they average and store
statistics:

| | weight of the new value | stored variance | default ε |
|---|---|---|---|
| batchnorm | `update_weight` | unbiased | 1e-5 |
| PyTorch | `momentum` | unbiased | 1e-5 |
| ONNX, opset 14 and newer | 1 − `momentum` | biased | 1e-5 |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._checks import mapping
from batchnorm._core import real_array

TORCH_NAMES = {"mean": "running_mean", "var": "running_var", "gamma": "weight", "beta": "bias"}
_SHOWN_KEYS = 12


def torch_parameters(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the parameters of one PyTorch batch-normalization layer under our names.

    PyTorch's `running_var` is the unbiased variance, as ours is, so no number changes. `num_batches_tracked`
    is not needed and not read.

    Args:
        state_dict: Maps names to arrays, or to CPU tensors of PyTorch, of any real dtype.
        prefix: The part of the keys before `running_mean`, including the dot: `"features.1."`.

    Returns:
        `mean` and `var`, and `gamma` and `beta`, which are None where the state has no weight and bias.

    Raises:
        ValueError: The state has no running statistics under this prefix.
        TypeError: `state_dict` is not a mapping, or an array in it is not real, has a mask or requires grad.
    """
    mapping("state_dict", state_dict, "module.state_dict()")
    needed = (prefix + "running_mean", prefix + "running_var")
    missing = " and ".join(repr(key) for key in needed if key not in state_dict)
    if missing:
        keys = [repr(key) for key in state_dict]
        there = ", ".join(keys[:_SHOWN_KEYS]) or "no keys at all"
        rest = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        raise ValueError(f"state_dict: {missing} wanted (prefix {prefix!r}), but it has {there}{rest}")
    names = {ours: prefix + theirs for ours, theirs in TORCH_NAMES.items()}
    given = {ours: key for ours, key in names.items() if state_dict.get(key) is not None}
    parameters = {ours: real_array(f"state_dict[{key!r}]", state_dict[key]) for ours, key in given.items()}
    return dict.fromkeys(names) | parameters


def onnx_momentum(update_weight: float) -> float:
    """Return ONNX's attribute `momentum`, the weight of the old value, as float32 holds it.

    Raises:
        ValueError: The update weight is not in (0, 1], or so small that ONNX would never update.
    """
    if not 0 < update_weight <= 1:
        raise ValueError(f"update_weight: was {update_weight}, wanted a number above 0 and at most 1")
    momentum = float(np.float32(1 - update_weight))
    if momentum == 1:
        wanted = "more than 3e-8: ONNX holds 1 minus it in float32, where this is 1"
        raise ValueError(f"update_weight: was {update_weight}, wanted {wanted}")
    return momentum


def onnx_variance(var: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Return the biased variances that ONNX stores where we store the unbiased ones: var·(count − 1)/count.

    If every batch has `count` values per channel, this holds for moving averages as for each batch, since
    both sides average with the same weights.

    Raises:
        ValueError: The count is below 2, so that there is no unbiased variance.
    """
    if count < 2:
        raise ValueError(f"count: was {count}, wanted 2 or more, since 1 value has no unbiased variance")
    return var.astype(np.float64) * ((count - 1) / count)
