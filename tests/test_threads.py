"""Threads, levels and their environment variables; the interpreter lock; fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import batchnorm as bn


def run(script, *arguments, timeout=60, **environment):
    """A fresh interpreter on `script`; the variables that the core reads are set to `environment` alone."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("BATCHNORM_")}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def succeeds(script, *arguments, **environment):
    done = run(script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.usefixtures("restore_execution")
@pytest.mark.parametrize("call", ["moments", "train_forward", "backward", "infer", "infer_backward"])
def test_another_thread_runs_during_a_call(rng, call):
    """If the lock were held, no tick could fall well inside a call."""
    bn.set_num_threads(1)
    bn.set_simd_level(bn.simd_levels()[0])
    x = rng.standard_normal((400_000, 16))
    cache = bn.train_forward(x)[1]
    out = np.empty_like(x)
    mean, var = np.zeros(16), np.ones(16)
    work = {
        "moments": lambda: bn.moments(x),
        "train_forward": lambda: bn.train_forward(x, out=out),
        "backward": lambda: bn.backward(x, cache, out=out),
        "infer": lambda: bn.infer(x, mean, var, out=out),
        "infer_backward": lambda: bn.infer_backward(x, x, mean, var, out=out),
    }[call]
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    ticker = threading.Thread(target=tick)
    ticker.start()
    inside = 0
    try:
        for _ in range(30):
            start = time.perf_counter()
            work()
            end = time.perf_counter()
            margin = (end - start) / 5
            inside += sum(start + margin < t < end - margin for t in ticks)
            ticks.clear()
    finally:
        stop.set()
        ticker.join()
    assert inside >= 10


def test_calls_from_many_threads_at_once(rng):
    x = rng.standard_normal((20_000, 32))
    wanted = bn.train_forward(x)[0].tobytes()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(bn.train_forward(x)[0].tobytes())) for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert results == [wanted] * 8


FORK = """
import os, sys, time, warnings
import numpy as np
import batchnorm as bn

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tested
bn.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((200_000, 16))
wanted = bn.train_forward(x)[0].tobytes()
for generation in range(2):
    child = os.fork()
    if child:
        deadline = time.monotonic() + 30
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                sys.exit("the forked child hangs")
            time.sleep(0.01)
        if generation:
            os._exit(os.waitstatus_to_exitcode(status))
        assert bn.train_forward(x)[0].tobytes() == wanted, "the parent goes on"
        sys.exit(os.waitstatus_to_exitcode(status))
    good = bn.get_num_threads() == 3 and bn.train_forward(x)[0].tobytes() == wanted
    if generation or not good:
        os._exit(0 if good else 7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_use_does_not_hang():
    """In a child, and in a child's child, with the same bits and the same number of threads."""
    succeeds(FORK)


# Threads are in calls that take workers all the time, so that forks fall into the middle of it.
FORK_AMID_CALLS = """
import os, sys, threading, time, warnings
import numpy as np
import batchnorm as bn

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tested
bn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((2048, 64))  # 1 MiB: worth a second thread
f = bn.FrozenBatchNorm(np.zeros(64), np.ones(64), dtype="float64")
wanted = f(x)
stop = threading.Event()

def work():
    y = np.empty_like(x)
    while not stop.is_set():
        f(x, out=y)

threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
failed = 0
for _ in range(300):
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(f(x), wanted) and bn.get_num_threads() == 2 else 7)
    deadline = time.monotonic() + 20
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            sys.exit("the forked child hangs")
        time.sleep(0.0005)
    failed += done[1] != 0
stop.set()
sys.exit(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_amid_calls_of_other_threads_does_not_hang():
    succeeds(FORK_AMID_CALLS)


@pytest.mark.usefixtures("restore_execution")
def test_numbers_of_threads():
    for n in (1, 2, 5):
        bn.set_num_threads(n)
        assert bn.get_num_threads() == n


@pytest.mark.usefixtures("restore_execution")
def test_levels():
    levels = bn.simd_levels()
    assert levels
    assert len(set(levels)) == len(levels)
    for level in levels:
        bn.set_simd_level(level)
        assert bn.simd_level() == level
    bn.set_simd_level(None)
    assert bn.simd_level() == levels[-1]


PRINT = "import batchnorm as bn; print(bn.get_num_threads(), bn.simd_level())"


def test_environment_sets_threads():
    assert succeeds(PRINT, BATCHNORM_NUM_THREADS="3").split()[0] == "3"


@pytest.mark.parametrize("level", bn.simd_levels())
def test_environment_sets_the_level(level):
    assert succeeds(PRINT, BATCHNORM_SIMD=level).split()[1] == level


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_default_number_of_threads_keeps_to_the_affinity_mask():
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); " + PRINT
    assert succeeds(one).split()[0] == "1"
    assert 1 <= int(succeeds(PRINT).split()[0]) <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("variable", ["BATCHNORM_NUM_THREADS", "BATCHNORM_SIMD"])
@pytest.mark.parametrize("value", ["", " ", "0", "-1", "1.5", "many", "99999999999999999999"])
def test_a_bad_value_in_the_environment_is_a_named_error(variable, value):
    done = run(PRINT, **{variable: value})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError")
    assert variable in last
    assert f'"{value.strip()}"' in last or f'"{value}"' in last
