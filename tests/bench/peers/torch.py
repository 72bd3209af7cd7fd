"""PyTorch, in a process of its own, by the interpreter that `BENCH_TORCH` names.

Its interpreter may have another NumPy than ours. `torch_process` is what runs there: it takes the tensors
through shared memory, works on a copy of them in memory like ours, and times its calls itself. Between them
it waits for a line on its standard input. It inherits the processors that this process is bound to.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.case import EPS, Call, Case

ARRAYS = ("x", "dy", "out", "gamma", "beta", "mean", "var")
VARIABLE = "BENCH_TORCH"
TESTS = Path(__file__).parents[2]


class Process:
    """The process that runs PyTorch; raises ImportError where it cannot."""

    def __init__(self, interpreter: str) -> None:
        path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        try:
            self.popen = subprocess.Popen(
                [interpreter, "-m", "bench.peers.torch_process"],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise ImportError(f"{interpreter}: {error.strerror}") from None
        try:
            started = self.answer()
        except RuntimeError as error:
            started = {"missing": str(error)}
        if "missing" in started:
            self.popen.communicate()
            raise ImportError(f"{interpreter}: {started['missing']}")
        self.version = str(started["version"])
        atexit.register(self.popen.communicate)  # the end of its input ends it

    def answer(self) -> dict[str, Any]:
        """The next line that it says."""
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"the process for PyTorch ended with status {self.popen.wait()}")
        return json.loads(line)

    def ask(self, **command: object) -> dict[str, Any]:
        """What it answers to a command, which is a method of `torch_process.Commands`."""
        self.popen.stdin.write(json.dumps(command) + "\n")
        self.popen.stdin.flush()
        return self.answer()


class Pass:
    """A pass of some cases, one after the other; called, it gives the last one's answer."""

    def __init__(self, shared: list[Any], direction: str) -> None:
        self.shared, self.direction = shared, direction

    def __call__(self) -> Any:
        return self.answers()[-1]

    def answers(self) -> list[Any]:
        """The answer to every case, in memory that the next call writes over."""
        PROCESS.ask(do="answer", direction=self.direction)
        return self.shared

    def timed(self, number: int) -> float:
        """Seconds that all the cases take, of `number` times in a row."""
        return float(PROCESS.ask(do="time", direction=self.direction, number=number)["seconds"])


def version() -> str:
    return PROCESS.version


def calls(case: Case, threads: int) -> dict[str, Call]:
    return together([case], threads)


def together(cases: Sequence[Case], threads: int) -> dict[str, Call]:
    """The passes that PyTorch has for all the cases. It forgets the cases of an earlier call."""
    arrays = [{name: getattr(case, name) for name in ARRAYS} for case in cases]
    sizes = [a.nbytes for of in arrays for a in of.values()]
    starts = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)]).tolist()
    memory = os.memfd_create("bench")
    os.truncate(memory, starts[-1])
    view = mmap.mmap(memory, starts[-1])
    place, outs, told = iter(starts), [], []
    for case, of in zip(cases, arrays, strict=True):
        offsets = {name: next(place) for name in ARRAYS}
        for name, a in of.items():
            shared = np.frombuffer(view, a.dtype, a.size, offsets[name]).reshape(a.shape)
            shared[...] = a
        outs.append(
            np.frombuffer(view, case.out.dtype, case.out.size, offsets["out"]).reshape(case.out.shape)
        )
        told.append(
            {
                "offsets": offsets,
                "shape": case.row.shape,
                "axis": case.row.axis,
                "dtype": case.row.dtype,
                "parameters": case.gamma.dtype.name,
            }
        )
    path = f"/proc/{os.getpid()}/fd/{memory}"
    passes = PROCESS.ask(do="take", memory=path, cases=told, threads=threads, eps=EPS)["passes"]
    os.close(memory)
    return {direction: Pass(outs, direction) for direction in passes}


if VARIABLE not in os.environ:
    raise ImportError(f"{VARIABLE} names no interpreter")
PROCESS = Process(os.environ[VARIABLE])
