"""PyTorch: the kernel behind F.batch_norm, into given memory; channels-last tensors in that memory format.

Its backward pass has no kernel that writes into given memory: it allocates dx, as training with PyTorch does.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.case import EPS, Call, Case
from bench.rows import BACKWARD, FORWARD, INFERENCE


def version() -> str:
    return torch.__version__


def calls(case: Case, threads: int) -> dict[str, Call]:
    if case.row.dtype == "bfloat16":
        return {}  # NumPy has no bfloat16 that PyTorch could take
    torch.set_num_threads(threads)
    channels_last = case.row.axis == -1

    def tensor(a):
        return torch.from_dlpack(a).movedim(-1, 1) if channels_last else torch.from_dlpack(a)

    x, dy, out = (tensor(a) for a in (case.x, case.dy, case.out))
    gamma, beta, mean, var = (torch.from_dlpack(p) for p in (case.gamma, case.beta, case.mean, case.var))
    spare = {"save_mean": torch.empty_like(gamma), "save_invstd": torch.empty_like(gamma)}
    norm = torch.ops.aten.native_batch_norm
    training, population = (
        (gamma, beta, None, None, True, 0.1, EPS),
        (gamma, beta, mean, var, False, 0.1, EPS),
    )
    try:
        _, *saved = torch.native_batch_norm(x, *training)
        norm.out(x, *training, out=out, **spare)
    except RuntimeError:
        return {}  # this version has no kernel for the dtype, or none that writes into given memory

    def forward():
        norm.out(x, *training, out=out, **spare)
        return case.out

    def infer():
        norm.out(x, *population, out=out, **spare)
        return case.out

    def backward():
        return torch.ops.aten.native_batch_norm_backward(
            dy, x, gamma, None, None, *saved, True, EPS, [True, True, True]
        )[0]

    def finished(dx):
        return np.from_dlpack((dx.movedim(1, -1) if channels_last else dx).contiguous())

    backward.finished = finished
    return {FORWARD: forward, INFERENCE: infer, BACKWARD: backward}
