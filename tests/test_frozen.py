"""FrozenBatchNorm: its results, its errors, its equality."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
import warnings

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
import cases
import oracle

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
PAIRS = [("float64", x_dtype) for x_dtype in cases.DTYPES]
PAIRS += [("float32", x_dtype) for x_dtype in cases.DTYPES if x_dtype != F64]
LAYOUTS = (
    cases.Layout((9, 17)),
    cases.Layout((3, 5, 7, 7)),
    cases.Layout((3, 7, 7, 5), channel_axis=-1),
    cases.Layout((3, 17, 5, 7), memory=cases.NHWC_AS_NCHW),
)


@pytest.mark.parametrize(("dtype", "x_dtype"), PAIRS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_call_has_the_bits_of_the_defining_expression(rng, layout, dtype, x_dtype):
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    frozen = bn.FrozenBatchNorm(mean, var, gamma, beta, channel_axis=layout.channel_axis, dtype=dtype)
    x = layout.normal(rng, x_dtype, mean=1.0, std=3.0)
    rounded = (p.astype(dtype) for p in (mean, var, gamma, beta))
    expected = oracle.infer(x, *rounded, float(np.float32(1e-5)), layout.channel_axis)
    y = frozen(x)
    assert y.dtype == x_dtype
    assert cases.bits(y) == cases.bits(expected)
    out = np.empty_like(x)
    assert frozen(x, out=out) is out
    assert cases.bits(out) == cases.bits(expected)


def test_backward_holds_the_statistics_fixed(rng):
    mean, var, gamma, beta = cases.parameters(rng, 5)
    frozen = bn.FrozenBatchNorm(mean, var, gamma, beta, eps=1e-3, dtype="float64")
    x, dy = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5, 3))
    sigma = np.sqrt(var + float(np.float32(1e-3)))[:, None]
    dx, dgamma, dbeta = frozen.backward(dy, x)
    np.testing.assert_allclose(dx, gamma[:, None] / sigma * dy, rtol=1e-14)
    np.testing.assert_allclose(dgamma, (dy * (x - mean[:, None]) / sigma).sum((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(dbeta, dy.sum((0, 2)), rtol=1e-12)
    out = np.empty_like(dy)
    assert frozen.backward(dy, x, out=out).dx is out
    assert out.tobytes() == dx.tobytes()


def test_parameters_are_rounded_once():
    frozen = bn.FrozenBatchNorm([0.1, 0.2], 0.3, gamma=0.7, beta=[1 / 3, 2 / 3])
    assert (frozen.channels, frozen.channel_axis, frozen.dtype) == (2, 1, F32)
    assert frozen.mean.tolist() == np.float32([0.1, 0.2]).tolist()
    assert frozen.var.tolist() == np.float32([0.3, 0.3]).tolist()
    assert frozen.gamma.tolist() == np.float32([0.7, 0.7]).tolist()
    assert frozen.beta.tolist() == np.float32([1 / 3, 2 / 3]).tolist()
    assert frozen.eps == float(np.float32(1e-5)) != 1e-5
    wide = bn.FrozenBatchNorm([0.1], [0.3], dtype=np.float64)
    assert (wide.mean.tolist(), wide.dtype, wide.eps) == ([0.1], F64, frozen.eps)
    assert (wide.gamma.tolist(), wide.beta.tolist()) == ([1.0], [0.0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_of_it_can_be_changed(dtype):
    given = np.ones(3, dtype)
    frozen = bn.FrozenBatchNorm(given, given, dtype=dtype)
    given[:] = 7
    assert frozen.mean.tolist() == [1, 1, 1]
    for name in ("mean", "var", "gamma", "beta"):
        values = getattr(frozen, name)
        assert values.dtype == dtype
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 2
        with pytest.raises(ValueError, match="WRITEABLE"):
            values.flags.writeable = True
    for name in ("mean", "eps", "fingerprint", "channels", "something_else"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(frozen, name, 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"mean": [0.0, np.nan]}, ValueError, "mean"),
        ({"mean": [0.0, np.inf]}, ValueError, "mean"),
        ({"mean": ["0", "1"]}, TypeError, "mean"),
        ({"mean": [0.0, 1j]}, TypeError, "mean"),
        ({"mean": [[0.0, 1.0]]}, ValueError, "mean"),
        ({"var": [1.0, -1e-9]}, ValueError, "var"),
        ({"var": [1.0, np.nan]}, ValueError, "var"),
        ({"var": [1.0, 1.0, 1.0]}, ValueError, "var|mean"),
        ({"gamma": [1.0, np.inf]}, ValueError, "gamma"),
        ({"gamma": [1.0, 1.0, 1.0]}, ValueError, "gamma"),
        ({"beta": [np.nan, 0.0]}, ValueError, "beta"),
        ({"mean": [0.0, 1e39]}, ValueError, "mean: out of the range of float32 in channel 1; dtype='fl"),
        ({"var": [1e39, 1.0]}, ValueError, r"var: out of the range of float32 in channel 0;"),
        ({"var": [1e-50, 1e-50]}, ValueError, r"var: out of the range of float32 in channels 0, 1;"),
        ({"gamma": [1.0, -1e39]}, ValueError, r"gamma: out of the range of float32 in channel 1;"),
        ({"beta": [1e39, 1.0]}, ValueError, r"beta: out of the range of float32 in channel 0;"),
        (
            {"mean": 0.0, "var": [1.0, 1.0], "gamma": [1.0, 1.0, 1.0]},
            ValueError,
            r"gamma has shape \(3,\); wa",
        ),
        ({"mean": [], "var": []}, ValueError, "0 channels"),
        ({"eps": -1e-5}, ValueError, "eps"),
        ({"eps": None}, TypeError, "eps: was None, wanted a number"),
        ({"eps": "1e-5"}, TypeError, "eps: was '1e-5', wanted a number"),
        ({"eps": np.nan}, ValueError, "eps"),
        ({"eps": 1e39}, ValueError, r"eps: 1e\+39 is inf in float32"),
        ({"eps": 1e-50}, ValueError, r"eps: 1e-50 is 0\.0 in float32"),
        ({"eps": 1e39, "dtype": "float64"}, ValueError, r"eps: 1e\+39 is inf in float32"),
        ({"eps": 0.0, "var": [1.0, 0.0]}, ValueError, "eps"),
        ({"dtype": "float16"}, TypeError, r"dtype: was 'float16', wanted float32 or float64"),
        ({"dtype": ">f4"}, TypeError, "dtype"),
        ({"dtype": None}, TypeError, "dtype: was None"),
        ({"dtype": "nonsense"}, TypeError, "dtype: was 'nonsense'"),
        ({"channel_axis": 1.0}, TypeError, r"channel_axis: was 1\.0, wanted an integer"),
        ({"channel_axis": True}, TypeError, "channel_axis: was True"),
        ({"channel_axis": 2**63}, ValueError, "channel_axis: was 9223372036854775808"),
    ],
)
def test_refusals(change, error, match):
    with pytest.raises(error, match=match):
        bn.FrozenBatchNorm(**{"mean": [0.0, 1.0], "var": [1.0, 1.0]} | change)


@pytest.mark.parametrize("longest", ["mean", "var", "gamma", "beta"])
def test_each_parameter_broadcasts_to_the_longest(longest):
    single = {"mean": 0.5, "var": np.float32(2), "gamma": [3.0], "beta": np.array(-1.0)}
    parameters = single | {longest: [1.0, 2.0, 3.0]}
    full = {name: np.broadcast_to(np.ravel(values), (3,)) for name, values in parameters.items()}
    frozen = bn.FrozenBatchNorm(**parameters)
    assert frozen.channels == 3
    assert frozen == bn.FrozenBatchNorm(**full)
    assert bn.FrozenBatchNorm(**single).channels == 1


def test_long_lists_of_channels_are_cut():
    with pytest.raises(ValueError, match=r"in channels 0, 1, 2, 3, 4, 5, 6, 7 and 92 more;"):
        bn.FrozenBatchNorm(np.zeros(100), np.full(100, 1e-50))


def test_float64_keeps_what_float32_cannot():
    frozen = bn.FrozenBatchNorm([1e39], [1e-50], gamma=[1e-60], beta=[-1e39], dtype="float64")
    assert (frozen.mean[0], frozen.var[0], frozen.gamma[0], frozen.beta[0]) == (1e39, 1e-50, 1e-60, -1e39)


def test_eps_may_be_zero_where_every_variance_is_positive():
    frozen = bn.FrozenBatchNorm([1.0], [4.0], eps=0)
    assert frozen.eps == 0.0
    assert frozen(np.float32([[5.0]])).tolist() == [[2.0]]
    assert frozen == bn.FrozenBatchNorm([1.0], [4.0], eps=-0.0)


def test_warns_of_means_that_rounding_moves_too_far():
    mean = np.array([0.1, 1e6 + 0.03, 1e6 + 0.03, 1e8 + 3, 1e6 + 0.03])
    sigma = np.array([1.0, 1.0, 400, 15_000, 0.0])  # errors of 0.75e-4 and 2e-4 σ on either side of the bound
    with pytest.warns(UserWarning, match=r"^mean: .* in channels 1, 3, 4; dtype='float64' keeps") as caught:
        bn.FrozenBatchNorm(mean, sigma**2)
    assert [w.filename for w in caught] == [__file__]
    wide = bn.FrozenBatchNorm(mean, sigma**2, dtype="float64")
    assert wide.mean.tolist() == mean.tolist()


def test_the_warning_looks_at_eps_too():
    mean, var = [1e6 + 0.03], [1e-6]
    with pytest.warns(UserWarning, match="in channel 0;"):
        bn.FrozenBatchNorm(mean, var, eps=1e-6)
    bn.FrozenBatchNorm(mean, var, eps=1e6)


def test_the_warning_names_the_line_that_called_the_package():
    x = np.array([[1e6 + 0.03], [1e6 + 0.13]])
    with pytest.warns(UserWarning, match="mean") as caught:
        coarse = bn.FrozenBatchNorm.from_moments(bn.moments(x))
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(coarse)  # what is rounded already costs nothing


@pytest.mark.parametrize("x_dtype", cases.DTYPES, ids=str)
def test_which_tensors_go_with_which_parameters(x_dtype):
    x = np.ones((2, 1), x_dtype)
    assert bn.FrozenBatchNorm([0.0], [1.0], dtype="float64")(x).dtype == x_dtype
    narrow = bn.FrozenBatchNorm([0.0], [1.0])
    if x_dtype != F64:
        assert narrow(x).dtype == x_dtype
        return
    for call in (lambda: narrow(x), lambda: narrow.backward(x, x), lambda: narrow(x.astype(">f8"))):
        with pytest.raises(TypeError, match="float64 tensors want a layer with float64 parameters"):
            call()


class Array:
    """A tensor of another library."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


class DLPack(Array):
    __array__ = None

    def __dlpack__(self, **keywords):
        return self.values.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


@pytest.mark.parametrize("tensor", [Array, DLPack])
def test_tensors_of_other_libraries(tensor):
    frozen = bn.FrozenBatchNorm(Array(np.array([1.0])), Array(np.array([4.0], np.float16)), eps=0)
    assert frozen(tensor(np.float32([[5.0]]))).tolist() == [[2.0]]
    with pytest.raises(TypeError, match=r"^x: float64 tensors want"):
        frozen(tensor(np.array([[5.0]])))


def test_refused_calls_leave_out_alone():
    frozen = bn.FrozenBatchNorm([0.0], [1.0])
    out = np.full((2, 1), 7.0)
    for x_dtype, name in ((np.float64, "x"), (np.float32, "out")):
        x = np.ones((2, 1), x_dtype)
        with pytest.raises(TypeError, match=f"^{name}"):
            frozen(x, out=out)
        with pytest.raises(TypeError, match=f"^{name}"):
            frozen.backward(x, x, out=out)
    narrow = np.full((2, 1), 7, np.float32)
    with pytest.raises(TypeError, match=r"^x"):
        frozen(np.ones((2, 1)), out=narrow)
    for call in (frozen, lambda x, out: frozen.backward(x, x, out)):
        with pytest.raises(TypeError, match=r"^out is list; wanted a NumPy array"):
            call(np.ones((2, 1), np.float32), [1])
    assert out.tolist() == narrow.tolist() == [[7], [7]]
    with pytest.raises(ValueError, match="2"):
        frozen(np.ones((2, 2), np.float32))


def sha256(dtype, channel_axis, eps, *arrays):
    hashed = f"batchnorm-frozen/1\n{dtype}\n".encode()
    hashed += struct.pack("<qQd", channel_axis, len(arrays[0]), eps)
    hashed += b"".join(np.asarray(values).astype(dtype).tobytes() for values in arrays)
    return hashlib.sha256(hashed).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fingerprint(rng, dtype):
    mean, var, gamma, beta = (p.astype(dtype) for p in cases.parameters(rng, 3))
    eps = float(np.float32(1e-3))
    frozen = bn.FrozenBatchNorm(mean, var, gamma, beta, eps=1e-3, channel_axis=-1, dtype=dtype)
    assert frozen.fingerprint == sha256(dtype, -1, eps, gamma, beta, mean, var)
    plain = bn.FrozenBatchNorm(mean, var, eps=1e-3, dtype=dtype)
    assert plain.fingerprint == sha256(dtype, 1, eps, np.ones(3), np.zeros(3), mean, var)


def test_equal_means_equal_fingerprints():
    same = {"mean": [0.5, -1.0], "var": [1.0, 2.0], "gamma": [1.0, 3.0], "beta": [0.0, 1.0]}
    changes = (
        {"mean": [0.5, -1.5]},
        {"var": [1.0, 2.5]},
        {"gamma": [1.5, 3.0]},
        {"beta": [-0.0, 1.0]},
        {"eps": 1e-3},
        {"channel_axis": -1},
        {"dtype": "float64"},
    )
    one, other = bn.FrozenBatchNorm(**same), bn.FrozenBatchNorm(**same)
    assert one == other
    assert hash(one) == hash(other)
    assert one != "something else"
    assert len({one, other, *(bn.FrozenBatchNorm(**same | change) for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_equal(again):
    frozen = bn.FrozenBatchNorm([0.1], [0.3], [2.0], [1.0], eps=1e-3, channel_axis=-1, dtype="float64")
    x = np.linspace(-1, 1, 5)[:, None]
    assert again(frozen) == frozen
    assert again(frozen)(x).tobytes() == frozen(x).tobytes()


def test_repr_is_short():
    frozen = bn.FrozenBatchNorm(np.zeros(1000), np.ones(1000))
    assert repr(frozen) == (
        "FrozenBatchNorm(channels=1000, channel_axis=1, dtype=float32, eps=1e-05, "
        f"fingerprint={frozen.fingerprint[:12]}…)"
    )


@pytest.mark.parametrize("ddof", [0, 1])
def test_from_moments(rng, ddof):
    x = rng.normal(3, 2, (50, 4, 3))
    frozen = bn.FrozenBatchNorm.from_moments(
        bn.moments(x), [1, 2, 3, 4], eps=1e-3, ddof=ddof, channel_axis=-2, dtype="float64"
    )
    np.testing.assert_allclose(frozen.mean, x.mean((0, 2)), rtol=1e-14)
    np.testing.assert_allclose(frozen.var, x.var((0, 2), ddof=ddof), rtol=1e-13)
    assert frozen.gamma.tolist() == [1, 2, 3, 4]
    assert (frozen.eps, frozen.channel_axis) == (float(np.float32(1e-3)), -2)
    default = bn.FrozenBatchNorm.from_moments(bn.moments(x))
    assert (default.eps, default.channel_axis, default.dtype) == (float(np.float32(1e-5)), 1, F32)
    np.testing.assert_allclose(default.var, x.var((0, 2), ddof=1), rtol=1e-6)


def test_from_moments_of_too_few_values():
    moments = bn.Moments([2.0, 1.0, 0.0], np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"moments: 2 values or more .* found channels 1, 2 with fewer"):
        bn.FrozenBatchNorm.from_moments(moments)
    with pytest.raises(ValueError, match=r"moments: 1 value or more .* found channel 2 with fewer"):
        bn.FrozenBatchNorm.from_moments(moments, ddof=0)
    with pytest.raises(ValueError, match="ddof: was 2, wanted 1"):
        bn.FrozenBatchNorm.from_moments(moments, ddof=2)


def test_16_bit_parameters_are_taken(rng):
    mean = rng.normal(size=3).astype(ml_dtypes.bfloat16)
    assert bn.FrozenBatchNorm(mean, np.ones(3, np.float16)).mean.tolist() == mean.astype(np.float32).tolist()


@pytest.mark.parametrize("name", ["rank", "opset"])
def test_what_is_no_integer_is_named_by_to_onnx(name):
    for value in ("2", 1j, 4.0, True):
        with pytest.raises(TypeError, match=rf"^{name}: was {value!r}, wanted an integer"):
            bn.FrozenBatchNorm([0.0], [1.0]).to_onnx(**{name: value})
