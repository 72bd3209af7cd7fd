"""Accepted tensors: memory orders, strides, byte orders, alignment, DLPack, `__array__`; and `out`."""

from __future__ import annotations

import numpy as np
import pytest

import batchnorm as bn
import cases
from cases import bits, strides
from dlpack import Exporter

MEAN, VAR, GAMMA, BETA = (
    np.array(p) for p in ([1.0, -2.0, 3.0], [1.0, 0.5, 4.0], [2.0, -1.0, 0.5], [0.0, 1.0, -3.0])
)


@pytest.fixture
def x(rng, dtype):
    return rng.standard_normal((4, 3, 6)).astype(dtype)


def infer(x, **kwargs):
    return bn.infer(x, MEAN, VAR, GAMMA, BETA, **kwargs)


def readonly(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def reversed_in_memory(x):
    return x[::-1, :, ::-1].copy()[::-1, :, ::-1]


def strided(x):
    return np.repeat(np.repeat(x, 2, 0), 3, 2)[::2, :, ::3]


def padded(x):
    return np.pad(x, ((0, 0), (0, 1), (0, 2)))[:, :3, :6]


def misaligned(x):
    memory = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    memory[...] = x
    return memory


TAKEN_AS_THEY_LIE = {
    "C order": np.ascontiguousarray,
    "Fortran order": np.asfortranarray,
    "channels innermost": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1),
    "channels outermost": lambda x: np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
    "samples innermost": lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1),
    "read-only": readonly,
    "misaligned": misaligned,
    "odd strides on an axis of one": lambda x: np.lib.stride_tricks.as_strided(
        x[:1].copy(), (1, 3, 6), (1, *x.strides[1:])
    ),
    "subclass": lambda x: x.view(type("Sub", (np.ndarray,), {})),
}
TAKEN_BY_COPY = {
    "strided": strided,
    "padded": padded,
    "negative strides": reversed_in_memory,
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "broadcast within a channel": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
}


@pytest.mark.parametrize("form", TAKEN_AS_THEY_LIE)
def test_dense_arrays_are_not_copied_and_y_has_their_memory_order(x, form):
    a = TAKEN_AS_THEY_LIE[form](x)
    y, cache = bn.train_forward(a)
    assert cache.x is a or np.shares_memory(cache.x, a)
    assert strides(y) == strides(a)
    assert strides(infer(a)) == strides(a)
    assert strides(bn.backward(a, cache).dx) == strides(a)
    assert bits(infer(a)) == bits(infer(np.array(a, order="C", subok=False)))
    np.testing.assert_allclose(
        *(v.astype(float) for v in (y, bn.train_forward(np.array(a, order="C"))[0])), atol=1e-6
    )


@pytest.mark.parametrize("form", TAKEN_BY_COPY)
def test_other_arrays_work_by_copy(x, form):
    a = TAKEN_BY_COPY[form](x)
    plain = np.ascontiguousarray(a)
    before = plain.tobytes()
    y, cache = bn.train_forward(a, GAMMA, BETA)
    assert not np.shares_memory(cache.x, a)
    wanted, wanted_cache = bn.train_forward(plain, GAMMA, BETA)
    assert bits(y) == bits(wanted)
    assert bn.moments(a) == wanted_cache.moments
    assert bits(infer(a)) == bits(infer(plain))
    for got, want in zip(bn.backward(a, cache), bn.backward(plain, wanted_cache), strict=True):
        assert bits(got) == bits(want)
    for got, want in zip(*(bn.infer_backward(v, v, MEAN, VAR, GAMMA) for v in (a, plain)), strict=True):
        assert bits(got) == bits(want)
    assert np.ascontiguousarray(a).tobytes() == before


@pytest.mark.parametrize("native", cases.DTYPES[:3], ids=str)
def test_foreign_byte_order_works_by_copy(rng, native):
    x = rng.standard_normal((4, 3, 6)).astype(native)
    foreign = x.astype(native.newbyteorder())
    assert foreign.dtype != x.dtype
    y, cache = bn.train_forward(foreign)
    assert y.dtype == native
    assert bits(y) == bits(bn.train_forward(x)[0])
    assert bits(infer(foreign)) == bits(infer(x))
    assert bits(bn.backward(foreign, cache).dx) == bits(bn.backward(x, cache).dx)


def test_dy_of_another_memory_order_is_copied_into_that_of_x(x):
    dy = np.asfortranarray(x)
    _, cache = bn.train_forward(x)
    for got, wanted in zip(bn.backward(dy, cache), bn.backward(x, cache), strict=True):
        assert bits(got) == bits(wanted)
    assert strides(bn.backward(dy, cache).dx) == strides(x)
    frozen = bn.infer_backward(dy, x, MEAN, VAR)
    assert bits(frozen.dx) == bits(bn.infer_backward(x, x, MEAN, VAR).dx)
    assert strides(frozen.dx) == strides(x)


class Arraylike:
    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return self.a


class DLPackOnly:
    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **kwargs):
        return self.a.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


def test_array_protocol(x):
    y, cache = bn.train_forward(Arraylike(x))
    assert type(y) is np.ndarray
    assert np.shares_memory(cache.x, x)
    assert bits(y) == bits(bn.train_forward(x)[0])


@pytest.mark.parametrize("native", cases.DTYPES[:3], ids=str)
@pytest.mark.parametrize("form", [f for f in TAKEN_AS_THEY_LIE if f not in ("misaligned", "subclass")])
def test_dlpack_shares_memory(rng, native, form):
    x = TAKEN_AS_THEY_LIE[form](rng.standard_normal((4, 3, 6)).astype(native))
    y, cache = bn.train_forward(DLPackOnly(x))
    assert type(y) is np.ndarray
    assert np.shares_memory(cache.x, x)
    assert strides(y) == strides(x)
    assert bits(y) == bits(bn.train_forward(x)[0])


@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=str)
def test_dlpack_forms_that_numpy_does_not_make(x, dtype):
    """No strides at all; a byte offset that aligns no element. Memory is given back once, after its use."""
    memory = np.concatenate([np.zeros(5, np.uint8), np.frombuffer(x.tobytes(), np.uint8)])
    for options in ({}, {"strides": (18, 6, 1)}):
        e = Exporter(memory, x.shape, "float", 8 * dtype.itemsize, byte_offset=5, **options)
        y = infer(e)
        assert y.dtype == dtype
        assert bits(y) == bits(infer(x))
        assert e.deleted == 1
        _, cache = bn.train_forward(e)
        assert bits(bn.backward(x, cache).dx) == bits(bn.backward(x, bn.train_forward(x)[1]).dx)
        assert e.deleted == 1, "the cache still holds x"
        del cache
        assert e.deleted == 2


def test_the_cache_keeps_x_alive(x):
    wanted = bn.backward(x, bn.train_forward(x)[1])
    _, cache = bn.train_forward(Arraylike(x.copy()))
    junk = [np.full(x.shape, np.nan, x.dtype) for _ in range(50)]
    assert bits(bn.backward(x, cache).dx) == bits(wanted.dx)
    assert len(junk) == 50


CALLS_WITH_OUT = {
    "infer": lambda x, out: infer(x, out=out),
    "infer_backward": lambda x, out: bn.infer_backward(x, x, MEAN, VAR, out=out).dx,
    "train_forward": lambda x, out: bn.train_forward(x, out=out)[0],
    "normalize": lambda x, out: bn.normalize(x, bn.moments(x), out=out)[0],
    "backward": lambda x, out: bn.backward(x, bn.train_forward(x)[1], out=out).dx,
    "gradient_apply": lambda x, out: bn.gradient_apply(
        x, (c := bn.train_forward(x)[1]), bn.gradient_sums(x, c), out=out
    ),
}
NOT_OUT = {
    "another shape": (ValueError, lambda x: np.empty((4, 3, 7), x.dtype)),
    "another rank": (ValueError, lambda x: np.empty((4, 18), x.dtype)),
    "another dtype": (
        TypeError,
        lambda x: np.empty(x.shape, np.float32 if x.dtype != np.float32 else np.float64),
    ),
    "foreign byte order": (TypeError, lambda x: np.empty(x.shape, ">f4" if x.dtype.itemsize == 4 else ">f8")),
    "another memory order": (ValueError, lambda x: np.asfortranarray(np.empty_like(x))),
    "strided": (ValueError, lambda x: np.empty((4, 3, 12), x.dtype)[:, :, ::2]),
    "broadcast": (ValueError, lambda x: np.broadcast_to(np.empty_like(x[:1]), x.shape)),
    "read-only": (ValueError, lambda x: readonly(x)),
    "a list": (TypeError, lambda x: x.tolist()),
    "not NumPy's": (TypeError, lambda x: Arraylike(x.copy())),
}


@pytest.mark.parametrize("call", CALLS_WITH_OUT)
@pytest.mark.parametrize("form", NOT_OUT)
def test_out_that_does_not_fit_is_refused(x, call, form):
    error, make = NOT_OUT[form]
    out = make(x)
    before = repr(out), np.asarray(getattr(out, "a", out)).tobytes()
    with pytest.raises(error, match=r"\bout\b"):
        CALLS_WITH_OUT[call](x, out)
    assert (repr(out), np.asarray(getattr(out, "a", out)).tobytes()) == before


@pytest.mark.parametrize("call", CALLS_WITH_OUT)
def test_out_that_overlaps_x_or_dy_in_part_is_refused(x, call):
    n = x.size
    memory = np.zeros(3 * n, x.dtype)
    a = memory[n : 2 * n].reshape(x.shape)
    a[...] = x
    before = memory.tobytes()
    for start in (1, n - 18, n - 1, n + 1, n + 18, 2 * n - 1):
        with pytest.raises(ValueError, match=r"^out shares memory with (x|dy)"):
            CALLS_WITH_OUT[call](a, memory[start : start + n].reshape(x.shape))
    assert memory.tobytes() == before
    for start in (0, 2 * n):
        out = memory[start : start + n].reshape(x.shape)
        assert bits(CALLS_WITH_OUT[call](a, out)) == bits(CALLS_WITH_OUT[call](x, None))


@pytest.mark.parametrize("call", sorted(set(CALLS_WITH_OUT) - {"infer", "train_forward"}))
def test_out_that_is_an_input_still_needed_is_refused(x, call):
    """The cache of `normalize` holds x by reference, and gradients read x, which here is dy too."""
    before = x.tobytes()
    with pytest.raises(ValueError, match=r"^out shares memory with x"):
        CALLS_WITH_OUT[call](x, x)
    assert x.tobytes() == before


LARGE = [((4, 3, 6), 1), ((300, 40), 1), ((5, 20, 49), 1), ((40, 3, 4000), 1), ((9, 7, 5, 33), -1)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), LARGE, ids=str)
def test_training_in_place(shape, axis, dtype):
    """y over x and dx over dy have the bits of those apart; the backward pass then asks for a copy of x."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(2, 3, shape).astype(dtype) for _ in range(2))
    y, cache = bn.train_forward(x, 2.0, -1.0, channel_axis=axis)
    gradients, sums = bn.backward(dy, cache), bn.gradient_sums(dy, cache)

    over = x.copy()
    result, without = bn.train_forward(over, 2.0, -1.0, channel_axis=axis, out=over)
    assert result is over
    assert bits(over) == bits(y)
    assert without.x is None
    assert without.moments == cache.moments
    for call in (
        lambda **x: bn.backward(dy, without, **x),
        lambda **x: bn.gradient_sums(dy, without, **x),
        lambda **x: bn.gradient_apply(dy, without, sums, **x),
    ):
        with pytest.raises(ValueError, match=r"^x is needed: .* wanted x=, a copy"):
            call()
        call(x=x)

    again = dy.copy()
    assert bn.backward(again, without, x=x, out=again).dx is again
    assert bits(again) == bits(gradients.dx)
    again = dy.copy()
    assert bits(bn.gradient_apply(again, cache, sums, out=again)) == bits(gradients.dx)
    mean, var = cache.moments.mean, cache.moments.var
    wanted = bn.infer_backward(dy, x, mean, var, channel_axis=axis)
    again = dy.copy()
    assert bits(bn.infer_backward(again, x, mean, var, channel_axis=axis, out=again).dx) == bits(wanted.dx)


@pytest.mark.parametrize("call", CALLS_WITH_OUT)
def test_out_is_filled_in_the_memory_order_of_x(x, call):
    for a in (x, np.asfortranarray(x), np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)):
        wanted = CALLS_WITH_OUT[call](a, None)
        out = np.empty_like(a)
        assert CALLS_WITH_OUT[call](a, out) is out
        assert bits(out) == bits(wanted)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_zero_rows(shape, dtype):
    """Inference and its gradient are empty, moments neutral; training has too few values (test_errors.py)."""
    x = np.empty(shape, dtype)
    assert infer(x).shape == shape
    out = np.empty(shape, dtype)
    assert infer(x, out=out) is out
    dx, dgamma, dbeta = bn.infer_backward(x, x, MEAN, VAR, GAMMA)
    assert dx.shape == shape
    assert dgamma.tolist() == dbeta.tolist() == [0, 0, 0]
    assert bn.moments(x).count.tolist() == [0, 0, 0]
