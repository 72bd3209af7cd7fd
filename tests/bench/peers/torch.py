"""PyTorch's kernels in their `out=` forms; channels-last tensors in its channels-last memory format."""

from __future__ import annotations

import torch

from bench.case import EPS, Call, Case
from bench.rows import BACKWARD, FORWARD, INFERENCE


def version() -> str:
    return torch.__version__


def calls(case: Case, threads: int) -> dict[str, Call]:
    if case.row.dtype == "bfloat16":
        return {}  # NumPy's bfloat16 is not one that PyTorch takes
    torch.set_num_threads(threads)

    def tensor(a):
        t = torch.from_dlpack(a)
        return t.movedim(-1, 1) if case.row.axis == -1 and t.ndim == 4 else t

    x, dy, out = (tensor(a) for a in (case.x, case.dy, case.out))
    gamma, beta, mean, var = (torch.from_dlpack(p) for p in (case.gamma, case.beta, case.mean, case.var))
    saved, spare, given = ([torch.empty_like(gamma) for _ in range(2)] for _ in range(3))
    norm, backward = torch.ops.aten.native_batch_norm, torch.ops.aten.native_batch_norm_backward
    norm.out(x, gamma, beta, None, None, True, 0.1, EPS, out=out, save_mean=saved[0], save_invstd=saved[1])

    def forward():
        norm.out(
            x, gamma, beta, None, None, True, 0.1, EPS, out=out, save_mean=spare[0], save_invstd=spare[1]
        )
        return case.out

    def infer():
        norm.out(
            x, gamma, beta, mean, var, False, 0.1, EPS, out=out, save_mean=spare[0], save_invstd=spare[1]
        )
        return case.out

    def back():
        wanted = [True, True, True]
        memory = {"out0": out, "out1": given[0], "out2": given[1]}
        backward.out(dy, x, gamma, None, None, *saved, True, EPS, wanted, **memory)
        return case.out

    return {FORWARD: forward, INFERENCE: infer, BACKWARD: back}
