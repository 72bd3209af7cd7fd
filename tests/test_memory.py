"""No temporary grows with x, and what grows with its channels fails as MemoryError where it does not fit.

Few rows of many channels, a few values each, are what tempts to temporaries.
"""

import os
import platform
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


SWEEP = """
import resource, sys
import numpy as np
import batchnorm as bn

shape, names = eval(sys.argv[1]), sys.argv[2:]
channels = shape[1]
x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 97
gradient, out, small = x[::-1] % 13, np.zeros_like(x), np.ones((4, 3), np.float32)
dy, residual, one = gradient.copy(), x - 40, np.ones(channels)
moments, epilogue = bn.moments(x), dict(activation="relu", residual=residual)
plain, full = bn.train_forward(x)[1], bn.train_forward(x, **epilogue)[1]
sums, full_sums, data = bn.gradient_sums(dy, plain), bn.gradient_sums(dy, full), moments.to_bytes()
frozen, layer, ready = bn.FrozenBatchNorm(one, one), bn.BatchNorm(channels), bn.BatchNorm(channels)
layer(x), ready(x), ready.backward(dy)
calls = {
    "moments": lambda: bn.moments(x),
    "merge": lambda: moments.merge(moments),
    "var": lambda: moments.var_unbiased,
    "to_bytes": lambda: moments.to_bytes(),
    "from_bytes": lambda: bn.Moments.from_bytes(data),
    "normalize": lambda: bn.normalize(x, moments, out=out),
    "train_forward": lambda: bn.train_forward(x, out=out),
    "in_place": lambda: bn.train_forward(dy, out=dy),
    "gradient_sums": lambda: bn.gradient_sums(dy, full),
    "merge_sums": lambda: sums.merge(sums),
    "sums_to_bytes": lambda: sums.to_bytes(),
    "gradient_apply": lambda: bn.gradient_apply(dy, plain, sums, out=dy),
    "apply_all": lambda: bn.gradient_apply(dy, full, full_sums, out=out, dresidual=dy),
    "backward": lambda: bn.backward(dy, plain, out=dy),
    "backward_all": lambda: bn.backward(dy, full, out=out, dresidual=dy),
    "infer": lambda: bn.infer(x, one, one, out=out),
    "infer_backward": lambda: bn.infer_backward(dy, x, one, one, **epilogue, out=dy),
    "infer_backward_all": lambda: bn.infer_backward(dy, x, one, one, **epilogue, out=out, dresidual=dy),
    "frozen": lambda: bn.FrozenBatchNorm(one, one),
    "frozen_call": lambda: frozen(x, out=out),
    "layer": lambda: layer(x),
    "layer_backward": lambda: ready.backward(dy),
}

def state():
    values = layer.population.mean, layer.population.var, ready.grad_gamma, ready.grad_beta, dy, out
    return [value.tobytes() for value in values]

def limit(extra):
    most = resource.RLIM_INFINITY
    if extra is not None:
        most = extra + int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

for name in names or calls:
    bn.release_memory()
    failed, extra, before = 0, 1 << 16, state()
    while True:
        limit(extra)
        try:
            calls[name]()
        except MemoryError:
            limit(None)
            failed += 1
        else:
            limit(None)
            break
        assert state() == before, f"{name} with {extra} bytes"
        bn.backward(small, bn.train_forward(small)[1])
        bn.release_memory()
        extra += 7 * channels
    print(name, failed)
    dy[...], out[...] = gradient, 0
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="limits the address space as Linux does")
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 400_000), []),
        ((2, 60_000, 32), ["train_forward", "in_place", "backward", "backward_all", "infer_backward_all"]),
        ((300, 30_000), ["moments", "backward"]),
        ((2, 200_000, 2), ["moments", "in_place", "backward_all"]),
    ],
    ids=str,
)
def test_whatever_array_does_not_fit_nothing_is_changed(shape, names):
    # Large arrays come straight from the system; the heap of small ones is not kept either.
    room = {"MMAP_THRESHOLD": 1 << 17, "TOP_PAD": 1 << 17, "TRIM_THRESHOLD": 1 << 18}
    env = os.environ | {f"MALLOC_{name}_": str(value) for name, value in room.items()}
    command = [sys.executable, "-c", SWEEP, repr(shape), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    failed = dict(line.split() for line in done.stdout.splitlines())
    assert len(failed) == (len(names) or 22)
    # A frozen layer has its parameters, and its calls make nothing of the size of a channel.
    assert [name for name, times in failed.items() if times == "0"] == ([] if names else ["frozen_call"])
