"""Peak memory of a few steps of one variant, in a process of its own: `python -m bench_network.memory`."""

from __future__ import annotations

import json
import subprocess
import sys

from bench.process import STATUS, peak_mib
from bench_network.rows import Row

STEPS = 4


def peak(row: Row, variant: str, threads: int) -> float | None:
    """MiB at the peak of a new process that takes a few steps; None where the system doesn't tell."""
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "bench_network.memory", json.dumps(row), variant, str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Take the steps and print the peak."""
    import torch

    from bench_network.networks import made, original, step, tensors

    row, variant, threads = Row(*json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    model = original(row)
    model = made(variant, model, row).train()
    for _ in range(STEPS):
        step(model, *tensors(row))
    print(peak_mib())


if __name__ == "__main__":
    main()
