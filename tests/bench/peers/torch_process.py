"""What the interpreter with PyTorch runs: batch normalization of the cases that it is told of, timed.

The kernel is the one behind F.batch_norm, into given memory; channels-last tensors are in that memory format.
The backward pass has no kernel that writes into given memory: it allocates dx, as training with PyTorch does.

A command is a line of JSON, and so is each answer. This module imports nothing that needs our package.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import BACKWARD, DIRECTIONS, FORWARD, INFERENCE
from bench.timing import once

Passes = dict[str, Callable[[], Any]]


class Taken:
    """A case in memory of this process, with the passes that PyTorch has for it."""

    def __init__(self, torch: Any, told: Mapping[str, Any], memory: mmap.mmap, eps: float) -> None:
        shape, channels_last = tuple(told["shape"]), told["axis"] == -1
        bfloat16 = told["dtype"] == "bfloat16"
        dtype = np.dtype("int16" if bfloat16 else told["dtype"])  # this NumPy may have no bfloat16
        self.torch, self.channels_last, self.bfloat16 = torch, channels_last, bfloat16

        def shared(name: str) -> Any:
            if name in ("x", "dy", "out"):
                count = int(np.prod(shape))
                return np.frombuffer(memory, dtype, count, told["offsets"][name]).reshape(shape)
            return np.frombuffer(memory, told["parameters"], shape[told["axis"]], told["offsets"][name])

        def tensor(name: str) -> Any:
            """In memory that NumPy allocates, as ours is: pages of shared memory are small and cost time."""
            made = torch.from_numpy(shared(name).copy())
            made = made.view(torch.bfloat16) if bfloat16 and name in ("x", "dy", "out") else made
            return made.movedim(-1, 1) if channels_last and made.ndim > 1 else made

        self.shared = shared("out")
        self.x, self.dy, self.out = (tensor(name) for name in ("x", "dy", "out"))
        self.parameters = [tensor(name) for name in ("gamma", "beta", "mean", "var")]
        self.passes = self.made(eps)

    def made(self, eps: float) -> Passes:
        """The passes; none if this version has no kernel for the dtype that writes into given memory."""
        x, dy, out = self.x, self.dy, self.out
        gamma, beta, mean, var = self.parameters
        aten = self.torch.ops.aten
        norm = functools.partial(aten.native_batch_norm.out, x, gamma, beta, out=out)
        spare = {name: self.torch.empty_like(gamma) for name in ("save_mean", "save_invstd")}
        forward = functools.partial(norm, None, None, True, 0.1, eps, **spare)
        infer = functools.partial(norm, mean, var, False, 0.1, eps, **spare)
        try:
            _, *saved = aten.native_batch_norm(x, gamma, beta, None, None, True, 0.1, eps)
            forward()
        except RuntimeError:
            return {}

        def backward() -> Any:
            return aten.native_batch_norm_backward(
                dy, x, gamma, None, None, *saved, True, eps, [True, True, True]
            )

        return {FORWARD: forward, INFERENCE: infer, BACKWARD: backward}

    def answer(self, direction: str) -> None:
        """Write what a pass gives into the shared memory."""
        y = self.passes[direction]()[0]
        y = y.movedim(1, -1) if self.channels_last else y
        y = y.view(self.torch.int16) if self.bfloat16 else y
        self.shared[...] = y.numpy()


class Commands:
    """What this process can be told to do."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.taken: list[Taken] = []

    def take(self, memory: str, cases: list[dict[str, Any]], threads: int, eps: float) -> dict[str, Any]:
        """Copy the cases from shared memory; answers name the passes that all of them have."""
        self.taken.clear()
        self.torch.set_num_threads(threads)
        with Path(memory).open("r+b") as file:
            view = mmap.mmap(file.fileno(), 0)
        self.taken += [Taken(self.torch, told, view, eps) for told in cases]
        return {"passes": [d for d in DIRECTIONS if all(d in taken.passes for taken in self.taken)]}

    def answer(self, direction: str) -> dict[str, Any]:
        """Run a pass of every case for its answer."""
        for taken in self.taken:
            taken.answer(direction)
        return {}

    def time(self, direction: str, number: int) -> dict[str, Any]:
        """Time a pass of all cases, one after the other."""
        passes = [taken.passes[direction] for taken in self.taken]

        def every() -> None:
            for call in passes:
                call()

        return {"seconds": once(passes[0] if len(passes) == 1 else every, number)}


def main() -> None:
    # Only answers go to standard output, whatever PyTorch prints.
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)

        def say(answer: dict[str, Any]) -> None:
            output.write(json.dumps(answer) + "\n")
            output.flush()

        try:
            import torch
        except ImportError as error:
            say({"missing": str(error)})
            return
        say({"version": torch.__version__})
        commands = Commands(torch)
        for line in sys.stdin:
            told = json.loads(line)
            say(getattr(commands, told.pop("do"))(**told))


if __name__ == "__main__":
    main()
