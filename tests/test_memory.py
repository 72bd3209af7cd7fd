"""No temporary memory grows with x, not even for few rows of many channels with a few values each."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
import batchnorm as bn

channels, inner, rows = 100_000, 31, int(sys.argv[2])
x = np.ones((rows, channels, inner), np.float32)
x[..., ::2] = 3
dy, out = x.copy(), np.zeros_like(x)
mean, var = np.ones(channels), np.ones(channels)
small = np.ascontiguousarray(x[:, :40])
_, cache = bn.train_forward(x)
calls = {
    "infer": lambda x, out: bn.infer(x, mean[: x.shape[1]], var[: x.shape[1]], out=out),
    "moments": lambda x, out: bn.moments(x),
    "train_forward": lambda x, out: bn.train_forward(x, out=out),
    "backward": lambda x, out: bn.backward(dy, cache, out=out) if x is not small else None,
}
call = calls[sys.argv[1]]
call(small, np.zeros_like(small))  # threads and modules are there
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(x, out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, x.nbytes // 1024, channels)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("call", ["infer", "moments", "train_forward", "backward"])
def test_peak_memory(call, rows):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, call, str(rows)], capture_output=True, text=True, check=True
    )
    grown, x, channels = map(int, done.stdout.split())
    # A dozen float64 a channel for parameters, statistics and what is made of them; a little for threads.
    allowed = 12 * 8 * channels // 1024 + 8 * 1024
    assert grown <= allowed, f"{grown} KiB for an x of {x} KiB"


NO_MEMORY = """
import resource, sys
import numpy as np
import batchnorm as bn

channels = 4_000_000
values = {dtype: np.ones(channels, dtype) for dtype in ("f4", "f8")}
moments = bn.Moments(values["f8"], values["f8"], values["f8"])
x = np.ones((2, 1, 1), np.float32)
calls = [
    lambda: bn.Moments(values["f4"], 0.0, 0.0),
    lambda: bn.GradientSums(values["f8"], values["f8"], values["f8"]),
    lambda: bn.infer(x, values["f8"], 1.0),
    lambda: bn.infer(x, [1] * channels, 1.0),
    lambda: moments.mean,
    lambda: moments.count,
]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
for number, call in enumerate(calls):
    try:
        call()
    except MemoryError:
        print("MemoryError", number)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert moments == bn.Moments(values["f8"], values["f8"], values["f8"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_vectors_that_do_not_fit_are_a_memory_error():
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"MemoryError {number}" for number in range(6)]
