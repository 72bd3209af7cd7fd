"""Errors: cases for each kind of error of the core, and for the errors that the binding raises itself.

Each case makes the real call and checks the exception's type, its kind, and the words that name the argument,
what it was and what was wanted. The core lists its kinds: none can be added without a case here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from math import inf, nan
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
from batchnorm._core import ERROR_KINDS, Coefficients
from dlpack import Exporter

NOT_FROM_PYTHON = {  # tested in the crate, or where it is said
    "Elements": "an array carries its own size, so a buffer never has another",
    "NoDresidual": "the binding says that dy lies in dresidual only where it is given",
    "LayoutMismatch": "the binding compares dtype, shape and memory order itself, and says which differs",
    "NoMemory": "a MemoryError, tested in test_memory.py under a limit of the address space",
    **({} if sys.platform == "linux" else {"Library": "there are no OpenMP teams for us on this system"}),
    "Overflow": "NumPy makes no array of more than 2**63 - 1 bytes",
}

X = np.ones((4, 3, 5), np.float32)
HALF = np.ones((4, 3), np.float16)
ONES = np.ones(3)
CACHE = bn.train_forward(X)[1]
SUMS = bn.gradient_sums(X, CACHE)
MOMENTS = bn.moments(X)
FORWARDS = {
    "moments": lambda x, **kw: bn.moments(x, **kw),
    "train_forward": lambda x, **kw: bn.train_forward(x, **kw),
    "normalize": lambda x, **kw: bn.normalize(x, MOMENTS, **kw),
    "infer": lambda x, **kw: bn.infer(x, ONES, ONES, **kw),
    "infer_backward": lambda x, **kw: bn.infer_backward(x, x, ONES, ONES, **kw),
    "Coefficients.infer": lambda x, **kw: Coefficients(ONES, ONES).infer(x, **kw),
    "Coefficients.backward": lambda x, **kw: Coefficients(ONES, ONES).backward(x, x, **kw),
}
FROZEN, TRAINING = ("infer", "infer_backward", "Coefficients"), ("train_forward", "normalize")


class Case(NamedTuple):
    """A call, the kind of error it raises, and a pattern of its words; all of them are ValueError."""

    kind: str
    words: str
    call: Callable[[], object]
    where: str = ""

    def __str__(self):
        return f"{self.kind} {self.where}".strip()


def each(kind, words, call, functions=tuple(FORWARDS)):
    """The same case for every function that takes x."""
    return [Case(kind, words, lambda f=FORWARDS[name]: call(f), name) for name in functions]


def with_parameter(kind, words, name, value):
    """The same case for every function that takes this parameter."""
    p = {"mean": ONES, "var": ONES, "gamma": ONES, "beta": ONES} | {name: value}
    calls = {"infer": lambda: bn.infer(X, **p), "Coefficients": lambda: Coefficients(**p)}
    if name != "beta":
        calls["infer_backward"] = lambda: bn.infer_backward(X, X, p["mean"], p["var"], p["gamma"])
    if name in ("gamma", "beta"):
        calls["train_forward"] = lambda: bn.train_forward(X, p["gamma"], p["beta"])
        calls["normalize"] = lambda: bn.normalize(X, MOMENTS, p["gamma"], p["beta"])
    return [Case(kind, words, call, f"{name}={value} in {function}") for function, call in calls.items()]


def with_eps(kind, words, functions, eps, var=ONES):
    calls = {
        "infer": lambda: bn.infer(X, ONES, var, eps=eps),
        "infer_backward": lambda: bn.infer_backward(X, X, ONES, var, eps=eps),
        "Coefficients": lambda: Coefficients(ONES, var, eps=eps),
        "train_forward": lambda: bn.train_forward(X, eps=eps),
        "normalize": lambda: bn.normalize(X, MOMENTS, eps=eps),
    }
    return [Case(kind, words, calls[function], f"eps={eps} in {function}") for function in functions]


def two_channels(function):
    return function(np.ones((4, 2), np.float32))


CASES = [
    *each("Rank", "x has rank 1; wanted rank 2 or more", lambda f: f(np.ones(3, np.float32))),
    *each("Rank", "x has rank 0; wanted rank 2 or more", lambda f: f(np.ones((), np.float32))),
    *each("ChannelAxis", "channel_axis is 3; .*rank 3", lambda f: f(X, channel_axis=3)),
    *each("ChannelAxis", "channel_axis is -4; .*rank 3", lambda f: f(X, channel_axis=-4)),
    *each("NoChannels", "x has 0 channels; wanted 1 or more", lambda f: f(np.ones((4, 0, 2), np.float32))),
    *each("Channels", "wanted", two_channels, ("normalize", "Coefficients.infer", "Coefficients.backward")),
    Case("Channels", "channels", lambda: MOMENTS.merge(bn.Moments(1, 0, 0)), "merge of moments"),
    Case("Channels", "channels", lambda: SUMS.merge(bn.GradientSums(1, 0, 0)), "merge of sums"),
    Case("Channels", "channels", lambda: bn.gradient_apply(X, CACHE, bn.GradientSums(1, 0, 0)), "sums"),
    Case("Channels", "m2", lambda: bn.Moments([1, 2], [0, 0], [0, 0, 0]), "Moments"),
    *(
        case
        for name in ("mean", "var", "gamma", "beta")
        for value, text in ((nan, "NaN"), (inf, "inf"), (-inf, "-inf"))
        for case in with_parameter("NotFinite", f"{name} is {text} in channel 1; wanted", name, [1, value, 1])
    ),
    *with_parameter("Negative", "var is -0.5 in channel 2; wanted 0 or more", "var", [1, 1, -0.5]),
    Case("Negative", "count is -1 in channel 0; wanted 0 or more", lambda: bn.Moments(-1, 0, 0), "count"),
    Case("Negative", "m2 is -3 in channel 0; wanted 0 or more", lambda: bn.Moments(1, 0, -3), "m2"),
    *(
        case
        for eps in (-1e-9, nan, inf, -inf)
        for case in with_eps("Eps", "eps is .*; wanted", FROZEN + TRAINING, eps)
    ),
    *with_eps("EpsZeroInTraining", "eps is 0 in training", TRAINING, 0.0),
    *with_eps("EpsZeroForZeroVariance", "eps is 0 although var is 0 in channel 1", FROZEN, 0.0, [1, 0, 1]),
    Case("TooFewValues", "count 1 in channel 1; wanted 2", lambda: bn.normalize(X[:, :2], FEW), "normalize"),
    Case("TooFewValues", "count 1 in channel 1; wanted 2", lambda: FEW.var_unbiased, "var_unbiased"),
    *(
        Case("Range", f"{re.escape(what)} is .*e.* in channel 0; wanted at most 3.4e38", call, what)
        for what, call in {
            "mean": lambda: bn.infer(HALF, [1e39, 0, 0], 1.0),
            "gamma/sqrt(var + eps)": lambda: bn.infer(HALF, 0.0, [1e-20, 1, 1], 1e30, eps=0.0),
            "beta": lambda: bn.infer_backward(HALF, HALF, 0.0, 1.0, beta=[1e39, 1, 1]),
        }.items()
    ),
    Case(
        "Counts",
        "sums are over 0 values in channel 0; wanted 20,",
        lambda: bn.gradient_apply(X, CACHE, bn.GradientSums(*np.zeros((3, 3)))),
        "gradient_apply",
    ),
    Case(
        "Counts",
        "sums are over 20 values in channel 0; wanted 40,",
        lambda: bn.backward(X, bn.normalize(X, bn.moments(X).merge(bn.moments(X)))[1]),
        "backward",
    ),
    Case("Bytes", "data are not the bytes of .*Moments", lambda: bn.Moments.from_bytes(b""), "none"),
    Case(
        "Bytes", "not the bytes of .*GradientSums", lambda: bn.GradientSums.from_bytes(b"x" * 99), "foreign"
    ),
    *(
        Case(
            "Threads", f"number of threads is {n}; wanted .* 1 to 1024", lambda n=n: bn.set_num_threads(n), n
        )
        for n in (0, -1, 1025)
    ),
    Case("ThreadSource", 'source of threads is "gomp"; wanted', lambda: bn.set_thread_source("gomp")),
    *(
        Case("Library", 'library is "nowhere"; wanted', lambda: bn.set_thread_source("openmp", "nowhere"))
        for _ in range(sys.platform == "linux")
    ),
    *(
        Case("Groups", f"groups is {n}; wanted a divisor of the number of channels, 3", call, f"{n}")
        for n in (0, 2)
        for call in (lambda n=n: bn.comoments(X, groups=n), lambda n=n: bn.whiten_forward(X, groups=n))
    ),
    Case(
        "OtherGroups",
        "other has 3 groups of channels; wanted 1",
        lambda: bn.comoments(X).merge(bn.comoments(X, groups=3)),
    ),
    Case("Method", "method is .*svd.*; wanted", lambda: bn.whiten_forward(X, method="svd")),
    Case("Steps", "steps is 5 for method .*zca", lambda: bn.whiten_forward(X, steps=5)),
    Case("Steps", "steps is 101 for .*1 to 100", lambda: bn.whiten_forward(X, method="iterative", steps=101)),
    Case("Singular", "group 0 of channels is singular .* larger eps", lambda: bn.whiten_forward(X, eps=0)),
    Case("Singular", "group 1 of channels is singular", lambda: bn.whitening_matrix([[[1.0]], [[0.0]]])),
    Case(
        "NotConverged",
        "did not converge for group 0 of channels; wanted",
        lambda: bn.whitening_matrix([np.diag([1.0, 0.0])], method="iterative"),
    ),
    Case(
        "EigenvalueGap",
        "components 0 and 1 of group 0 of channels .* wanted a relative gap",
        lambda: bn.whiten_backward(X, bn.whiten_forward(X, method="pca")[1]),
    ),
    Case("Level", "level is .*nonsense.*" + bn.simd_levels()[0], lambda: bn.set_simd_level("nonsense")),
]
FEW = bn.Moments([2, 1], [0, 0], [0, 0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case):
    def state():
        return X.tobytes(), MOMENTS.to_bytes(), SUMS.to_bytes(), bn.get_num_threads(), bn.simd_level()

    before = state()
    with pytest.raises(ValueError, match=case.words) as raised:
        case.call()
    assert raised.value.kind == case.kind
    assert state() == before


def test_every_kind_is_tested():
    assert len(ERROR_KINDS) > 10
    tested = {case.kind for case in CASES}
    assert tested | set(NOT_FROM_PYTHON) == set(ERROR_KINDS)
    assert not tested & set(NOT_FROM_PYTHON)


@pytest.mark.parametrize("function", FORWARDS)
@pytest.mark.parametrize(
    "dtype",
    [bool, np.int32, np.uint8, np.complex64, object, "U3", np.longdouble, "V4", ml_dtypes.float8_e4m3fn],
    ids=str,
)
def test_tensors_of_another_dtype(function, dtype):
    if np.dtype(dtype) == np.float64:
        pytest.skip("long double is float64 here")
    x = np.zeros((4, 3), dtype)
    with pytest.raises(TypeError, match=r"\b(x|dy)\b.*(float32|dtype)"):
        FORWARDS[function](x)


@pytest.mark.parametrize("function", FORWARDS)
@pytest.mark.parametrize("x", [None, 1.0, "x", [[1.0, 2.0, 3.0]], object()], ids=lambda v: type(v).__name__)
def test_what_is_no_tensor(function, x):
    with pytest.raises(TypeError, match=r"\b(x|dy)\b"):
        FORWARDS[function](x)


def test_a_masked_array_is_refused_not_taken_without_its_mask():
    x = np.ma.masked_array(X, mask=X > 0)
    for call in (FORWARDS["moments"], FORWARDS["infer"]):
        with pytest.raises(TypeError, match=r"^x is .*mask"):
            call(x)


@pytest.mark.parametrize("value", ["a", object(), [1j, 1, 1], None], ids=str)
@pytest.mark.parametrize("name", ["mean", "var", "gamma", "beta"])
def test_parameters_that_are_no_real_numbers(name, value):
    named = {"mean": ONES, "var": ONES, "gamma": ONES, "beta": ONES} | {name: value}
    if value is None and name in ("gamma", "beta"):
        assert bn.infer(X, **named).shape == X.shape
        return
    with pytest.raises(TypeError, match=name):
        bn.infer(X, **named)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3, 1), (0,)], ids=str)
def test_parameters_that_do_not_broadcast_to_the_channels(shape):
    for name in ("mean", "var", "gamma", "beta"):
        named = {"mean": ONES, "var": ONES, "gamma": ONES, "beta": ONES} | {name: np.ones(shape)}
        with pytest.raises(ValueError, match=name):
            bn.infer(X, **named)


@pytest.mark.parametrize(
    "exporter",
    [
        lambda: Exporter(X, (4, 3), "int", 32),
        lambda: Exporter(X, (4, 3), "complex", 64),
        lambda: Exporter(X, (4, 3), "bfloat", 8),
        lambda: Exporter(X, (4, 3), "float", 32, lanes=2),
        lambda: Exporter(X, (4, 3), "float", 32, device=(2, 0)),
    ],
    ids=["int32", "complex64", "bfloat8", "vectors", "another device"],
)
def test_dlpack_tensors_of_another_kind(exporter):
    e = exporter()
    with pytest.raises(TypeError, match=r"\bx\b"):
        bn.infer(e, ONES, ONES)


def test_a_dlpack_tensor_that_cannot_be_is_refused():
    for shape in ((-1, 3), (2**40, 3, 2**40), (2**31, 3, 2**31)):
        with pytest.raises((TypeError, ValueError), match=r"^x "):
            bn.infer(Exporter(X, shape, "float", 32), ONES, ONES)


def test_dy_must_be_like_x():
    for dy, error in (
        (X[:3], ValueError),
        (X[0], ValueError),
        (X.astype(np.float64), TypeError),
        (X.astype(np.float16), TypeError),
        (None, TypeError),
    ):
        for call in (
            lambda dy=dy: bn.backward(dy, CACHE),
            lambda dy=dy: bn.gradient_sums(dy, CACHE),
            lambda dy=dy: bn.gradient_apply(dy, CACHE, SUMS),
            lambda dy=dy: bn.infer_backward(dy, X, ONES, ONES),
        ):
            with pytest.raises(error, match=r"\bdy\b"):
                call()


def test_a_copy_that_does_not_fit_in_memory():
    x = np.broadcast_to(np.float32(0), (2**30, 2**30))
    with pytest.raises((MemoryError, ValueError)):
        bn.infer(x, 0.0, 1.0)


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (1, 3, 1), (0, 3, 5)], ids=str)
def test_a_batch_of_one_value_a_channel(shape):
    x, values = np.ones(shape, np.float32), "1 value" if shape[0] else "0 values"
    wanted = f"x has shape {list(shape)}, {values} in each channel; training wants 2 or more"
    for call in (bn.train_forward, bn.BatchNorm(3)):
        with pytest.raises(ValueError, match=rf"^{re.escape(wanted)}"):
            call(x)


def test_numbers_of_threads_that_are_no_numbers():
    for n in (1.5, "2", None):
        with pytest.raises(TypeError):
            bn.set_num_threads(n)
