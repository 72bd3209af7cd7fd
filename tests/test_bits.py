"""Contract 3: the same bits for any number of threads, any level, aligned or not, in place or not."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
import cases
import openmp
from cases import Layout, bits, moments_bits

THREADS = (1, 2, 3, 5, 8)
LARGE = (  # about a million values: several MB, split among threads
    Layout((8, 40, 56, 56)),
    Layout((40, 512, 7, 7)),
    Layout((1, 3, 577, 601)),
    Layout((8, 56, 56, 40), channel_axis=-1),
    Layout((15625, 64)),
    Layout((130, 8000)),
    Layout((300_007, 3)),
    Layout((8, 40, 56, 56), memory=cases.NHWC_AS_NCHW),
)


def everything(x, dy, axis, parameters):
    """The bits of all that the core computes from x and dy."""
    mean, var, gamma, beta = parameters
    y, cache = bn.train_forward(x, gamma, beta, channel_axis=axis)
    frozen = bn.infer(x, mean, var, gamma, beta, channel_axis=axis)
    follows = {"activation": "relu", "residual": dy}
    followed, through = bn.train_forward(x, gamma, beta, channel_axis=axis, **follows)
    results = {
        "moments": moments_bits(bn.moments(x, channel_axis=axis)),
        "moments of training": moments_bits(cache.moments),
        "y": bits(y),
        "invstd": bits(cache.invstd),
        "inference": bits(frozen),
        "y, followed": bits(followed),
        "inference, followed": bits(bn.infer(x, mean, var, gamma, beta, channel_axis=axis, **follows)),
    }
    for name, gradients in (
        ("training", bn.backward(dy, cache)),
        ("training, followed", bn.backward(dy, through)),
        ("inference", bn.infer_backward(dy, x, mean, var, gamma, channel_axis=axis)),
    ):
        results |= {f"{field}, {name}": bits(g) for field, g in gradients._asdict().items()}
    return results


def assert_same(got, wanted, how):
    differing = [name for name in wanted if got[name] != wanted[name]]
    assert not differing, f"other bits with {how}: {differing}"


def setting(rng, layout, dtype):
    parameters = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype, 30 * parameters[0], np.sqrt(parameters[1]))
    return x, layout.normal(rng, dtype), layout.channel_axis, parameters


@pytest.mark.usefixtures("restore_execution")
@pytest.mark.parametrize("layout", LARGE, ids=str)
def test_threads_and_levels(rng, layout, dtype):
    x, dy, axis, parameters = setting(rng, layout, dtype)
    ran = set()
    wanted = None
    for level in bn.simd_levels():
        bn.set_simd_level(level)
        for threads in THREADS:
            bn.set_num_threads(threads)
            got = everything(x, dy, axis, parameters)
            wanted = wanted or got
            assert_same(got, wanted, f"{threads} threads at level {level}")
            ran.add((bn.get_num_threads(), bn.simd_level()))
    assert ran == {(t, v) for t in THREADS for v in bn.simd_levels()}
    assert len(ran) >= len(THREADS)


@pytest.mark.usefixtures("restore_execution")
@pytest.mark.parametrize("layout", LARGE, ids=str)
def test_threads_of_an_openmp_runtime(rng, layout, dtype):
    library = openmp.runtime()
    x, dy, axis, parameters = setting(rng, layout, dtype)
    bn.set_num_threads(1)
    wanted = everything(x, dy, axis, parameters)
    bn.set_thread_source("openmp", library)
    for threads in (2, 3):
        bn.set_num_threads(threads)
        got = everything(x, dy, axis, parameters)
        assert_same(got, wanted, f"{threads} threads of an OpenMP runtime")
    assert bn.get_thread_source() == "openmp"


def workers():
    """The threads of the pool that the operating system sees in this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text())
    return sum(name.startswith("batchnorm-") for name in names)


@pytest.mark.usefixtures("restore_execution")
@pytest.mark.skipif(sys.platform != "linux", reason="sees threads in /proc, which is Linux")
def test_threads_exist_when_asked_for(rng):
    """Threads exist, not only the setting. The caller is one of them; old ones take time to end."""
    x = rng.standard_normal((300_000, 2))
    for threads in (8, 1, 3):
        bn.set_num_threads(threads)
        bn.moments(x)
        deadline = time.monotonic() + 20
        while workers() != threads - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert workers() == threads - 1


def test_this_machine_has_more_than_one_level():
    if len(bn.simd_levels()) == 1:
        pytest.skip(f"only one level can run here: {bn.simd_levels()}")
    assert len(set(bn.simd_levels())) > 1
    assert bn.simd_level() in bn.simd_levels()


def misaligned(a, offset):
    """A copy of `a` in the same memory order that starts `offset` bytes past a boundary."""
    memory = np.empty(a.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    order = np.argsort([-s for s in a.strides], kind="stable")
    flat = memory[start : start + a.nbytes].view(a.dtype).reshape([a.shape[k] for k in order])
    result = flat.transpose(np.argsort(order))
    result[...] = a
    assert result.ctypes.data % 64 == offset
    return result


ANY_LAYOUT = (*cases.LAYOUTS[::3], LARGE[0], LARGE[4])


@pytest.mark.parametrize("layout", [f for f in ANY_LAYOUT if np.prod(f.shape) >= 2 * f.channels], ids=str)
def test_any_alignment(rng, layout, dtype):
    x, dy, axis, parameters = setting(rng, layout, dtype)
    wanted = everything(x, dy, axis, parameters)
    for offset in (1, dtype.itemsize, 33):
        got = everything(misaligned(x, offset), misaligned(dy, 3 * offset % 64), axis, parameters)
        assert_same(got, wanted, f"x {offset} bytes past a boundary")


@pytest.mark.parametrize("layout", [Layout((3, 5, 100)), Layout((65, 33)), Layout((2, 3, 4097))], ids=str)
def test_every_alignment(rng, layout, dtype):
    """1 to 15 elements and 1 to 63 bytes past a boundary, inputs and outputs each otherwise."""
    x, dy, axis, parameters = setting(rng, layout, dtype)
    wanted = everything(x, dy, axis, parameters)
    y, cache = bn.train_forward(x, *parameters[2:], channel_axis=axis)
    dx = bn.backward(dy, cache).dx
    for offset in {k * dtype.itemsize % 64 for k in range(1, 16)} | set(range(1, 64, 2)):
        moved = misaligned(x, offset), misaligned(dy, 7 * offset % 64)
        assert_same(everything(*moved, axis, parameters), wanted, f"x {offset} bytes past a boundary")
        out = misaligned(x, 5 * offset % 64)
        bn.train_forward(moved[0], *parameters[2:], channel_axis=axis, out=out)
        assert bits(out) == bits(y), f"y {5 * offset % 64} bytes past a boundary"
        bn.backward(moved[1], cache, out=out)
        assert bits(out) == bits(dx), f"dx {5 * offset % 64} bytes past a boundary"


@pytest.mark.parametrize("layout", ANY_LAYOUT, ids=str)
def test_in_place_and_into_given_memory(rng, layout, dtype):
    x, dy, axis, (mean, var, gamma, beta) = setting(rng, layout, dtype)

    def infer(x, out=None):
        return bn.infer(x, mean, var, gamma, beta, channel_axis=axis, out=out)

    wanted = bits(infer(x))
    for out in (x.copy(order="K"), misaligned(x, 1)):
        in_place = infer(out, out=out)
        assert in_place is out
        assert bits(out) == wanted
        out[...] = 0
        assert infer(x, out=out) is out
        assert bits(out) == wanted
    dx = bn.infer_backward(dy, x, mean, var, gamma, channel_axis=axis).dx
    assert bn.infer_backward(dy, x, mean, var, gamma, channel_axis=axis, out=out).dx is out
    assert bits(out) == bits(dx)


@pytest.mark.parametrize("layout", [f for f in ANY_LAYOUT if np.prod(f.shape) >= 2 * f.channels], ids=str)
def test_training_into_given_memory(rng, layout, dtype):
    x, dy, axis, (_, _, gamma, beta) = setting(rng, layout, dtype)
    y, cache = bn.train_forward(x, gamma, beta, channel_axis=axis)
    dx = bn.backward(dy, cache).dx
    out = misaligned(x, 1)
    again, _ = bn.train_forward(x, gamma, beta, channel_axis=axis, out=out)
    assert again is out
    assert bits(out) == bits(y)
    assert bn.backward(dy, cache, out=out).dx is out
    assert bits(out) == bits(dx)
    for offset in (0, 1, dtype.itemsize):  # y over x, dx over dy
        over = misaligned(x, offset)
        assert bn.train_forward(over, gamma, beta, channel_axis=axis, out=over)[0] is over
        assert bits(over) == bits(y)
        over = misaligned(dy, offset)
        assert bn.backward(over, cache, out=over).dx is over
        assert bits(over) == bits(dx)


@pytest.mark.usefixtures("restore_execution")
def test_inference_of_a_part_with_other_threads(rng, dtype):
    """Any split of a large batch, for any number of threads: a row does not depend on its neighbours."""
    layout = Layout((61, 40, 33, 31))
    x, _, _, (mean, var, gamma, beta) = setting(rng, layout, dtype)
    whole = bn.infer(x, mean, var, gamma, beta)
    for threads, cuts in zip(THREADS, ([1], [7, 8, 60], [30], [2, 3, 5], range(1, 61)), strict=True):
        bn.set_num_threads(threads)
        parts = [bn.infer(p, mean, var, gamma, beta) for p in np.split(x, cuts)]
        assert bits(np.concatenate(parts)) == bits(whole)


@given(cases.layouts(min_values=1), st.sampled_from(cases.DTYPES), st.data())
def test_any_batch_split_in_inference(layout, dtype, data):
    """Along any axis but the channels', anywhere: parts may be of another family than the whole."""
    rng = np.random.default_rng(0)
    x, _, axis, (mean, var, gamma, beta) = setting(rng, layout, dtype)
    split = data.draw(st.sampled_from([a for a in range(x.ndim) if a != axis % x.ndim]))
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[split]), max_size=5)))
    whole = bn.infer(x, mean, var, gamma, beta, channel_axis=axis)
    parts = [
        bn.infer(part, mean, var, gamma, beta, channel_axis=axis) for part in np.split(x, cuts, axis=split)
    ]
    assert bits(np.concatenate(parts, axis=split)) == bits(whole)


@pytest.mark.usefixtures("restore_execution")
@pytest.mark.parametrize(
    "layout",
    [
        Layout((6, 40, 30, 30)),
        Layout((3000, 70)),
        *(pytest.param(f, marks=pytest.mark.long) for f in LARGE[::3]),
    ],
    ids=str,
)
def test_repeated_a_hundred_times(rng, layout, dtype):
    """The bits are the same whichever thread takes which part, and when."""
    x, dy, axis, parameters = setting(rng, layout, dtype)
    wanted = everything(x, dy, axis, parameters)
    for turn in range(100):
        if turn % 20 == 0:
            bn.set_num_threads(THREADS[turn // 20])
        assert_same(
            everything(x, dy, axis, parameters), wanted, f"{bn.get_num_threads()} threads, time {turn}"
        )


class FloatMode:
    """The calling thread's MXCSR, through the C library's floating-point environment (x86-64 Linux)."""

    def __init__(self):
        self.libm = ctypes.CDLL("libm.so.6")
        self.environment = (ctypes.c_uint32 * 8)()  # the last word is MXCSR

    @property
    def mxcsr(self):
        self.libm.fegetenv(self.environment)
        return self.environment[7]

    @mxcsr.setter
    def mxcsr(self, value):
        self.libm.fegetenv(self.environment)
        self.environment[7] = value
        self.libm.fesetenv(self.environment)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="sets MXCSR, which is x86-64; by glibc"
)
@pytest.mark.usefixtures("restore_execution")
@pytest.mark.parametrize("layout", [Layout((5, 33)), Layout((3, 5, 65)), LARGE[1], LARGE[4]], ids=str)
@pytest.mark.parametrize("source", ["own", "openmp"])
def test_the_callers_rounding_and_flush_to_zero_do_not_matter(rng, layout, dtype, source):
    """Libraries built for fast mathematics leave such a mode behind. It stays; ours is the default one."""
    if source == "openmp":
        bn.set_thread_source(source, openmp.runtime())
    with ThreadPoolExecutor(1) as new_thread:  # it has no team yet
        new_thread.submit(in_another_mode, rng, layout, dtype).result()


def in_another_mode(rng, layout, dtype):
    upward_flushing = 0x4000 | 0x8040
    x, dy, axis, (mean, var, gamma, beta) = setting(rng, layout, dtype)
    parameters = mean, var, gamma * 1e-38, beta * 1e-38
    bn.set_num_threads(1)
    wanted = everything(x, dy, axis, parameters)
    mode = FloatMode()
    ours = mode.mxcsr
    mode.mxcsr = ours | upward_flushing
    try:
        bn.set_num_threads(2)  # a thread that is made now inherits the mode
        got = everything(x, dy, axis, parameters)
        left = mode.mxcsr
        flushed = np.array([1e-38], np.float32) * np.float32(1e-3)
    finally:
        mode.mxcsr = ours
    assert flushed == 0, "the mode is in force"
    assert left & 0xE040 == upward_flushing
    assert_same(got, wanted, "rounding upward, subnormal numbers flushed to zero")
