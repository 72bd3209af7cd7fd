"""Conversion of state from other frameworks' conventions to ours; no other module does it.

Frameworks agree on the arithmetic of batch normalization, but differ in how they average and store
statistics:

| | weight of the new value | stored variance | default ε |
|---|---|---|---|
| batchnorm | `update_weight` | unbiased | 1e-5 |
| PyTorch | `momentum` | unbiased | 1e-5 |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
