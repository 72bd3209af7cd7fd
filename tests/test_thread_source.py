"""Threads of an OpenMP runtime: whose they are, errors, the environment, fork, calls of several threads."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
import openmp
from cases import bits, moments_bits
from test_threads import succeeds

pytestmark = pytest.mark.usefixtures("restore_execution")


@pytest.fixture(scope="module")
def library():
    return openmp.runtime()


def everything(x):
    y, cache = bn.train_forward(x)
    dx, dgamma, dbeta = bn.backward(y, cache)
    return [bits(y), moments_bits(cache.moments), bits(dx), bits(dgamma), bits(dbeta)]


def test_set_and_get(library):
    assert bn.get_thread_source() == "own"
    for argument in (library, Path(library)):
        bn.set_thread_source("openmp", library=argument)
        assert bn.get_thread_source() == "openmp"
        bn.set_thread_source("own")
        assert bn.get_thread_source() == "own"


def test_what_is_refused_leaves_the_source(library):
    bn.set_thread_source("openmp", library)
    for source, path, words in (
        ("gomp", None, 'source of threads is "gomp"; wanted "own" .* or "openmp"'),
        ("own", library, 'source of threads is "own" with library .*; wanted "own" without a library'),
        (
            "openmp",
            "/no/libgomp.so.1",
            r'library is "/no/libgomp.so.1"; wanted an OpenMP runtime .*: .*cannot open',
        ),
        ("openmp", __file__, f'library is "{__file__}"; wanted an OpenMP runtime with GOMP_parallel: '),
        ("openmp", "libm.so.6", 'library is "libm.so.6"; wanted .*: it has no GOMP_parallel'),
        ("openmp", "nul\0", "library is "),
    ):
        with pytest.raises(ValueError, match=words):
            bn.set_thread_source(source, path)
        assert bn.get_thread_source() == "openmp"
    with pytest.raises(TypeError):
        bn.set_thread_source(None)
    with pytest.raises(TypeError):
        bn.set_thread_source("openmp", 1)


# Sizes at which a team helps, and threads of our own do not yet.
@pytest.mark.parametrize("shape", [(512, 64), (64, 1024), (8, 16, 24, 24), (2, 3, 100, 150)], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=lambda d: d.__name__)
def test_the_same_bits_on_tensors_that_only_a_team_shares(rng, library, shape, dtype):
    x = rng.standard_normal(shape).astype(dtype)
    wanted = everything(x)
    bn.set_thread_source("openmp", library)
    for threads in (1, 2, 3, 2):
        bn.set_num_threads(threads)
        assert everything(x) == wanted


# The threads of a process: those of NumPy's BLAS are there from the start.
WHOSE = """
import os, sys
from pathlib import Path
import numpy as np
import batchnorm as bn

def threads():
    tasks = Path("/proc/self/task").iterdir()
    return [(task / "comm").read_text().startswith("batchnorm-") for task in tasks]

x = np.random.default_rng(0).standard_normal((100_000, 16))
before = len(threads())
if len(sys.argv) > 1:
    bn.set_thread_source("openmp", sys.argv[1])
source = bn.get_thread_source()
bn.train_forward(x)
bn.infer(x, 0.0, 1.0)
print(source, len(threads()) - before, sum(threads()))
"""


def test_the_threads_are_those_of_the_runtime(library):
    assert succeeds(WHOSE, BATCHNORM_NUM_THREADS="3") == "own 2 2"
    assert succeeds(WHOSE, library, BATCHNORM_NUM_THREADS="3") == "openmp 2 0"
    assert succeeds(WHOSE, BATCHNORM_NUM_THREADS="3", BATCHNORM_THREAD_SOURCE="own") == "own 2 2"


@pytest.mark.skipif(sys.platform != "linux", reason="there are no OpenMP runtimes for us elsewhere")
def test_the_environment_sets_the_source():
    """The runtime that the process has, else the system's, else threads of our own: no error."""
    try:
        ctypes.CDLL("libgomp.so.1")
        wanted = "openmp 2 0"
    except OSError:
        wanted = "own 2 2"
    assert succeeds(WHOSE, BATCHNORM_NUM_THREADS="3", BATCHNORM_THREAD_SOURCE=" openmp ") == wanted


def test_the_runtime_that_the_process_shows_is_taken_first(library):
    """As PyTorch's is after `import torch`."""
    shown = f"import ctypes; ctypes.CDLL({library!r}, mode=ctypes.RTLD_GLOBAL)\n"
    libraries = "\nprint({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line})"
    source, found = succeeds(
        shown + WHOSE + libraries, BATCHNORM_NUM_THREADS="3", BATCHNORM_THREAD_SOURCE="openmp"
    ).splitlines()
    assert source == "openmp 2 0"
    assert found.count("gomp") == 1, found


BAD = """
import numpy as np
import batchnorm as bn
x = np.ones((4, 3))
passes = (lambda: bn.moments(x), lambda: bn.infer(x, 0.0, 1.0), lambda: bn.train_forward(x))
for call in (bn.get_thread_source, *passes):
    try:
        call()
    except ValueError as error:
        assert error.kind == "ThreadSource"
        print(error)
bn.set_thread_source("own")
bn.moments(x)
print(bn.get_thread_source())
"""


@pytest.mark.parametrize("value", ["", " ", "gomp", "OpenMP", "own,openmp"])
def test_a_bad_value_in_the_environment_is_an_error_of_every_pass(value):
    *errors, source = succeeds(BAD, BATCHNORM_THREAD_SOURCE=value).splitlines()
    assert source == "own"
    assert len(errors) == 4
    for error in errors:
        assert (
            f'source of threads is "{value.strip()}" (environment variable BATCHNORM_THREAD_SOURCE)' in error
        )


# Each generation is given 30 seconds; the runtime itself would hang for ever.
FORK = """
import multiprocessing, sys, warnings
import numpy as np
import batchnorm as bn

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tested
context = multiprocessing.get_context("fork")
library = sys.argv[1]
bn.set_num_threads(3)
bn.set_thread_source("openmp", library)
x = np.random.default_rng(0).standard_normal((200_000, 16))
wanted = bn.train_forward(x)[0].tobytes()

def check(generation):
    assert bn.get_thread_source() == "own"
    assert bn.train_forward(x)[0].tobytes() == wanted
    bn.set_thread_source("openmp", library)
    assert bn.get_thread_source() == "own"
    assert bn.get_num_threads() == 3
    assert bn.train_forward(x)[0].tobytes() == wanted
    if generation == 0:
        child(1)

def child(generation):
    process = context.Process(target=check, args=(generation,))
    process.start()
    process.join(30)
    if process.exitcode is None:
        process.kill()
        sys.exit("the forked child hangs")
    assert process.exitcode == 0

child(0)
assert bn.get_thread_source() == "openmp"
assert bn.train_forward(x)[0].tobytes() == wanted
"""


def test_a_fork_after_use_works_on_threads_of_its_own(library):
    succeeds(FORK, library)


def tasks():
    """The number of threads that the operating system sees in this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_calls_from_several_threads_at_once(rng, library):
    """Each calling thread has a team of its own, which ends with it."""
    x = rng.standard_normal((20_000, 32))
    wanted = everything(x)
    bn.set_thread_source("openmp", library)
    bn.set_num_threads(2)
    before = tasks()
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(everything, [x] * 12, timeout=120)) == [wanted] * 12
    deadline = time.monotonic() + 20
    while tasks() > before + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tasks() <= before + 1


def test_calls_inside_a_parallel_region(rng, library):
    """As those of an operator that runs on the threads of its library already."""
    x = rng.standard_normal((20_000, 32))
    wanted = everything(x)
    bn.set_thread_source("openmp", library)
    bn.set_num_threads(3)
    results = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def in_region(_):
        results[threading.get_ident()] = [everything(x) for _ in range(3)]

    ctypes.CDLL(library).GOMP_parallel(in_region, None, 2, 0)
    assert list(results.values()) == [[wanted] * 3] * 2
    assert everything(x) == wanted
