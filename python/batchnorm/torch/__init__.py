"""PyTorch's batch norm layers on the kernels of this package, for networks on CPUs (extra `torch`).

`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` take the place of PyTorch's layers of the same names: same
constructors, same state, same refusals. They can add a residual and apply an activation in the same pass.
`SyncBatchNorm` does the same over the batches of several processes, on CPU, where PyTorch's does not work.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("batchnorm.torch needs PyTorch: pip install 'batchnorm[torch]'") from error

from batchnorm.torch._layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch._models import freeze, recompute_population
from batchnorm.torch._replace import replace, restore
from batchnorm.torch._sync import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "freeze",
    "recompute_population",
    "replace",
    "restore",
]
