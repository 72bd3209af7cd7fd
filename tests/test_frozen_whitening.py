"""FrozenWhitening: its bits, its errors, its equality."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import batchnorm as bn
import cases
import oracle
from batchnorm._core import CoMoments, comoments, whitening_matrix
from cases import bits

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
PAIRS = [("float64", x_dtype) for x_dtype in cases.DTYPES]
PAIRS += [("float32", x_dtype) for x_dtype in cases.DTYPES if x_dtype != F64]
LAYOUTS = (
    (1, cases.Layout((9, 17))),
    (3, cases.Layout((70, 6))),
    (1, cases.Layout((3, 5, 7, 7))),
    (2, cases.Layout((2, 34, 3, 5))),
    (2, cases.Layout((3, 7, 7, 6), channel_axis=-1)),
    (1, cases.Layout((3, 7, 5, 9), channel_axis=-1)),
    (4, cases.Layout((3, 8, 5, 7), memory=cases.NHWC_AS_NCHW)),
    (1, cases.Layout((5, 40), channel_axis=0)),
    (5, cases.Layout((3, 4, 5, 6), channel_axis=2)),
    (1, cases.Layout((2, 33, 130))),
)
METHODS = ("zca", "pca", "cholesky", "iterative")


def layer_of(rng, channels, groups=1, **options):
    """A layer with any parameters of ordinary size; that its matrix whitens does not matter here."""
    matrix = rng.normal(size=(channels, channels // groups))
    mean, bias = rng.normal(0, 3, channels), rng.normal(size=channels)
    return bn.FrozenWhitening(matrix, mean, bias, **options)


@pytest.mark.parametrize(("dtype", "x_dtype"), PAIRS)
@pytest.mark.parametrize(("groups", "layout"), LAYOUTS, ids=str)
def test_call_has_the_bits_of_the_defining_expression(rng, groups, layout, dtype, x_dtype):
    axis = layout.channel_axis
    frozen = layer_of(rng, layout.channels, groups, channel_axis=axis, dtype=dtype)
    assert (frozen.channels, frozen.groups) == (layout.channels, groups)
    x = layout.normal(rng, x_dtype, mean=1.0, std=3.0)
    expected = oracle.whiten(x, frozen.matrix, frozen.mean, frozen.bias, axis)
    y = frozen(x)
    assert (y.dtype, cases.strides(y)) == (x_dtype, cases.strides(x))
    assert bits(y) == bits(expected)
    out = np.empty_like(x)
    assert frozen(x, out=out) is out
    assert bits(out) == bits(expected)
    assert frozen(x, out=x) is x
    assert bits(x) == bits(expected)


@pytest.mark.parametrize(("dtype", "x_dtype"), PAIRS)
@pytest.mark.parametrize(("groups", "layout"), LAYOUTS, ids=str)
def test_backward_has_the_bits_of_its_expression(rng, groups, layout, dtype, x_dtype):
    axis = layout.channel_axis
    frozen = layer_of(rng, layout.channels, groups, channel_axis=axis, dtype=dtype)
    dy = layout.normal(rng, x_dtype)
    expected = oracle.whiten_backward(dy, frozen.matrix, axis)
    dx = frozen.backward(dy)
    assert (dx.dtype, cases.strides(dx)) == (x_dtype, cases.strides(dy))
    assert bits(dx) == bits(expected)
    assert frozen.backward(dy, out=dy) is dy
    assert bits(dy) == bits(expected)


def test_backward_is_the_gradient(rng):
    """Finite differences of ℓ = Σ w·y; y is affine in x, so they are exact but for rounding."""
    frozen = layer_of(rng, 6, 2, dtype="float64")
    x, w = rng.normal(size=(2, 4, 6, 3))
    dx = frozen.backward(w)
    for _ in range(20):
        at = tuple(rng.integers(x.shape))
        step = np.zeros_like(x)
        step[at] = 0.5
        difference = np.sum(w * (frozen(x + step) - frozen(x - step)))
        np.testing.assert_allclose(difference, dx[at], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("restore_execution")
@pytest.mark.parametrize("x_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "shape"), [(1, (67, 12)), (3, (67, 12)), (2, (19, 8, 5, 7)), (1, (5, 64, 9))]
)
def test_the_same_bits_for_any_split_thread_and_level(rng, groups, shape, x_dtype):
    frozen = layer_of(rng, shape[1], groups, dtype="float64")
    x = rng.normal(size=shape).astype(x_dtype)
    expected = bits(oracle.whiten(x, frozen.matrix, frozen.mean, frozen.bias))
    backward = bits(oracle.whiten_backward(x, frozen.matrix))
    rows = len(x)
    cuts = ([], [1], [rows // 2], sorted(rng.choice(rows, 4, replace=False)), list(range(1, rows)))
    tried = 0
    for level in bn.simd_levels():
        bn.set_simd_level(level)
        for threads in (1, 2):
            bn.set_num_threads(threads)
            for cut in cuts:
                parts = np.split(x, cut)
                assert bits(np.concatenate([frozen(part) for part in parts])) == expected
                assert bits(np.concatenate([frozen.backward(part) for part in parts])) == backward
                tried += 1
    assert tried == len(bn.simd_levels()) * 2 * 5


@pytest.mark.usefixtures("restore_execution")
def test_the_same_bits_where_threads_share_the_work(rng):
    frozen = layer_of(rng, 48, 3)
    tensors = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 48, 57, 61), (20_011, 48))]
    for x in tensors:
        expected = bits(oracle.whiten(x, frozen.matrix, frozen.mean, frozen.bias))
        for threads in (1, 2, 5):
            bn.set_num_threads(threads)
            assert bits(frozen(x)) == expected


def test_a_nan_stays_in_its_group_and_position(rng):
    frozen = layer_of(rng, 6, 2)
    x = rng.normal(size=(4, 6, 5)).astype(np.float32)
    clean = frozen(x)
    x[1, 4, 2] = np.nan
    y = frozen(x)
    hit = np.zeros(x.shape, bool)
    hit[1, 3:, 2] = True
    assert np.isnan(y[hit]).all()
    assert bits(y[~hit]) == bits(clean[~hit])


def test_no_rows_are_taken(rng):
    frozen = layer_of(rng, 4)
    for shape in ((0, 4), (0, 4, 3), (2, 4, 0)):
        assert frozen(np.empty(shape, np.float32)).shape == shape


def test_parameters_are_rounded_once():
    matrix = [[0.1, 0.2], [1 / 3, 2 / 3]]
    frozen = bn.FrozenWhitening(matrix, 0.3)
    assert (frozen.channels, frozen.groups, frozen.channel_axis, frozen.dtype) == (2, 1, 1, F32)
    assert frozen.matrix.tolist() == np.float32(matrix).tolist()
    assert frozen.mean.tolist() == np.float32([0.3, 0.3]).tolist()
    assert frozen.bias.tolist() == [0, 0]
    wide = bn.FrozenWhitening([[0.1], [0.2]], [0.1, 0.3], 0.7, dtype=np.float64)
    assert (wide.matrix.tolist(), wide.mean.tolist()) == ([[0.1], [0.2]], [0.1, 0.3])
    assert (wide.bias.tolist(), wide.dtype, wide.groups) == ([0.7, 0.7], F64, 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_of_it_can_be_changed(dtype):
    matrix, mean = np.eye(3, dtype=dtype), np.ones(3, dtype)
    frozen = bn.FrozenWhitening(matrix, mean, dtype=dtype)
    matrix[:], mean[:] = 7, 7
    assert frozen.matrix.tolist() == np.eye(3).tolist()
    assert frozen.mean.tolist() == [1, 1, 1]
    for name in ("matrix", "mean", "bias"):
        values = getattr(frozen, name)
        assert values.dtype == dtype
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 2
        with pytest.raises(ValueError, match="WRITEABLE"):
            values.flags.writeable = True
    for name in ("matrix", "mean", "fingerprint", "channels", "groups", "something_else"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(frozen, name, 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"matrix": [[1.0, np.nan], [0.0, 1.0]]}, ValueError, r"^matrix: not finite in channel 0$"),
        ({"matrix": [[1.0, 0.0], [0.0, np.inf]]}, ValueError, r"^matrix: not finite in channel 1$"),
        ({"matrix": [["1", "0"], ["0", "1"]]}, TypeError, "^matrix"),
        ({"matrix": [[1j, 0], [0, 1]]}, TypeError, "^matrix"),
        ({"matrix": [1.0, 2.0]}, ValueError, r"^matrix: shape was \(2,\), wanted \(channels, D\)"),
        ({"matrix": np.ones((3, 2))}, ValueError, r"^matrix: shape was \(3, 2\), wanted \(channels, D\)"),
        ({"matrix": np.ones((2, 4))}, ValueError, r"^matrix: shape was \(2, 4\), wanted \(channels, D\)"),
        ({"matrix": np.ones((0, 0))}, ValueError, r"^matrix: shape was \(0, 0\)"),
        ({"matrix": np.ones((2, 0))}, ValueError, r"^matrix: shape was \(2, 0\)"),
        ({"matrix": np.ones((2, 2, 1))}, ValueError, r"^matrix: shape was \(2, 2, 1\)"),
        ({"mean": [0.0, np.nan]}, ValueError, r"^mean: not finite in channel 1$"),
        ({"mean": [np.inf, -np.inf]}, ValueError, r"^mean: not finite in channels 0, 1$"),
        ({"mean": ["0", "1"]}, TypeError, "^mean"),
        ({"mean": [0.0, 1.0, 2.0]}, ValueError, r"^mean: shape was \(3,\), wanted \(2,\) or a number$"),
        ({"mean": [[0.0, 1.0]]}, ValueError, r"^mean: shape was \(1, 2\), wanted \(2,\) or a number$"),
        ({"bias": [0.0, np.nan]}, ValueError, r"^bias: not finite in channel 1$"),
        ({"bias": [0.0, 1.0, 2.0]}, ValueError, r"^bias: shape was \(3,\), wanted \(2,\) or a number$"),
        (
            {"matrix": [[1, 0], [0, 1e39]]},
            ValueError,
            "matrix: out of the range of float32 in channel 1; dtype=",
        ),
        (
            {"mean": [1e39, 0]},
            ValueError,
            "mean: out of the range of float32 in channel 0; dtype='float64' wo",
        ),
        (
            {"bias": [1e39, 0]},
            ValueError,
            "bias: out of the range of float32 in channel 0; dtype='float64' wo",
        ),
        ({"dtype": "float16"}, TypeError, r"dtype: was 'float16', wanted float32 or float64"),
        ({"dtype": None}, TypeError, "dtype: was None"),
        ({"channel_axis": 1.0}, TypeError, r"channel_axis: was 1\.0, wanted an integer"),
        ({"channel_axis": True}, TypeError, "channel_axis: was True"),
        ({"channel_axis": 2**63}, ValueError, "channel_axis: was 9223372036854775808"),
    ],
)
def test_refusals(change, error, match):
    with pytest.raises(error, match=match):
        bn.FrozenWhitening(**{"matrix": np.eye(2), "mean": [0.0, 1.0]} | change)


def test_which_tensors_go_with_which_parameters():
    for x_dtype in cases.DTYPES:
        x = np.ones((2, 1), x_dtype)
        assert bn.FrozenWhitening([[1.0]], 0.0, dtype="float64")(x).dtype == x_dtype
        narrow = bn.FrozenWhitening([[1.0]], 0.0)
        if x_dtype != F64:
            assert narrow(x).dtype == narrow.backward(x).dtype == x_dtype
            continue
        for call, name in ((narrow, "x"), (narrow.backward, "dy")):
            with pytest.raises(TypeError, match=f"^{name}: float64 tensors want a layer with float64 param"):
                call(x)


def test_refused_calls_leave_out_alone():
    frozen = bn.FrozenWhitening(np.eye(2), 0.0)
    out = np.full((3, 2), 7.0)
    for call in (frozen, frozen.backward):
        with pytest.raises(TypeError, match=r"float64 tensors want"):
            call(np.ones((3, 2)), out=out)
        with pytest.raises(TypeError, match=r"^out"):
            call(np.ones((3, 2), np.float32), out=out)
        with pytest.raises(TypeError, match=r"^out"):
            call(np.ones((3, 2), np.float32), out=[1])
        for wrong in ((3, 3), (3,)):
            with pytest.raises(ValueError, match=r"^(x|dy)"):
                call(np.ones(wrong, np.float32))
    assert (out == 7).all()


def sha256(dtype, channel_axis, groups, matrix, *vectors):
    hashed = f"batchnorm-frozen-whitening/1\n{dtype}\n".encode()
    hashed += struct.pack("<qQQ", channel_axis, len(matrix), groups)
    hashed += b"".join(np.asarray(values).astype(dtype).tobytes() for values in (matrix, *vectors))
    return hashlib.sha256(hashed).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("groups", [1, 3])
def test_fingerprint(rng, dtype, groups):
    frozen = layer_of(rng, 6, groups, channel_axis=-1, dtype=dtype)
    assert frozen.fingerprint == sha256(dtype, -1, groups, frozen.matrix, frozen.mean, frozen.bias)
    plain = bn.FrozenWhitening(frozen.matrix, frozen.mean, dtype=dtype)
    assert plain.fingerprint == sha256(dtype, 1, groups, frozen.matrix, frozen.mean, np.zeros(6))


def test_equal_means_equal_fingerprints():
    same = {"matrix": [[1.0, 2.0], [3.0, 4.0]], "mean": [0.5, -1.0], "bias": [0.0, 1.0]}
    changes = (
        {"matrix": [[1.0, 2.0], [3.0, 4.5]]},
        {"matrix": [[1.0], [2.0]]},
        {"mean": [0.5, -1.5]},
        {"bias": [-0.0, 1.0]},
        {"channel_axis": -1},
        {"dtype": "float64"},
    )
    one, other = bn.FrozenWhitening(**same), bn.FrozenWhitening(**same)
    assert one == other
    assert hash(one) == hash(other)
    assert one != "something else"
    assert one != bn.FrozenBatchNorm([0.5, -1.0], 1.0)
    assert len({one, other, *(bn.FrozenWhitening(**same | change) for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_equal(rng, again):
    frozen = layer_of(rng, 4, 2, channel_axis=-1, dtype="float64")
    assert again(frozen) == frozen
    x = rng.normal(size=(5, 4))
    assert again(frozen)(x).tobytes() == frozen(x).tobytes()


def test_repr_is_short(rng):
    frozen = layer_of(rng, 100, 4)
    assert repr(frozen) == (
        "FrozenWhitening(channels=100, groups=4, channel_axis=1, dtype=float32, "
        f"fingerprint={frozen.fingerprint[:12]}…)"
    )


def data(rng, shape, groups, dtype=np.float64):
    """Values whose channels are correlated within their groups, with a mean."""
    size = shape[1] // groups
    mix = rng.normal(size=(groups, size, size)) + 2 * np.eye(size)
    z = np.moveaxis(rng.normal(size=shape), 1, -1)
    x = np.einsum("...gi,goi->...go", z.reshape(*z.shape[:-1], groups, size), mix).reshape(z.shape)
    return (np.moveaxis(x, -1, 1) + 3).astype(dtype)


def covariance(y, groups, ddof):
    """Of each group, (groups, D, D)."""
    rows = np.moveaxis(y, 1, 0).reshape(groups, y.shape[1] // groups, -1).astype(np.float64)
    return np.stack([np.atleast_2d(np.cov(group, ddof=ddof)) for group in rows])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_from_comoments_whitens(rng, method, groups, ddof, dtype):
    x = data(rng, (60, 8, 3), groups, dtype)
    together = comoments(x, groups=groups)
    options = {"method": method, "eps": 0.0, "ddof": ddof, "dtype": dtype}
    frozen = bn.FrozenWhitening.from_comoments(together, **options)
    assert (frozen.groups, frozen.dtype) == (groups, dtype)
    y = frozen(x)
    close = 2e-4 if dtype == "float32" or method == "iterative" else 1e-10
    np.testing.assert_allclose(y.mean((0, 2)), 0, atol=close)
    identity = np.broadcast_to(np.eye(8 // groups), (groups, 8 // groups, 8 // groups))
    np.testing.assert_allclose(covariance(y, groups, ddof), identity, atol=close)
    assert np.abs(covariance(y, groups, 1 - ddof) - identity).max() > 1e-3  # the test can tell them apart
    cov = together.cov_unbiased if ddof else together.cov
    w = whitening_matrix(cov, method=method, eps=0.0).reshape(8, -1)
    assert frozen.matrix.tolist() == w.astype(dtype).tolist()
    gamma, beta = rng.normal(size=8), rng.normal(size=8)
    scaled = bn.FrozenWhitening.from_comoments(together, gamma, beta, **options)
    assert scaled.matrix.tolist() == (gamma[:, None] * w).astype(dtype).tolist()
    assert scaled.bias.tolist() == beta.astype(dtype).tolist()


def test_from_comoments_has_the_defaults_of_from_moments(rng):
    together = comoments(data(rng, (60, 4), 1))
    frozen = bn.FrozenWhitening.from_comoments(together)
    w = whitening_matrix(together.cov_unbiased, method="zca", eps=1e-5).reshape(4, 4)
    assert (frozen.channel_axis, frozen.dtype) == (1, F32)
    assert frozen == bn.FrozenWhitening(w, together.mean)
    assert bn.FrozenWhitening.from_comoments(together, channel_axis=-1).channel_axis == -1


def test_one_group_a_channel_is_batch_norm(rng):
    """The diagonal case: W = 1/√(var + ε)."""
    x = rng.normal(3, 2, (50, 6, 4))
    gamma, beta = rng.normal(size=6), rng.normal(size=6)
    whitening = bn.FrozenWhitening.from_comoments(comoments(x, groups=6), gamma, beta, dtype="float64")
    norm = bn.FrozenBatchNorm.from_moments(bn.moments(x), gamma, beta, eps=1e-5, dtype="float64")
    np.testing.assert_allclose(whitening(x), norm(x), rtol=1e-6, atol=1e-6)  # eps is rounded in one of them


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"ddof": 2}, ValueError, "ddof: was 2, wanted 1"),
        ({"gamma": [1.0, np.nan, 1, 1]}, ValueError, "^gamma: not finite in channel 1$"),
        ({"gamma": [1.0, 2.0]}, ValueError, r"^gamma: shape was \(2,\), wanted \(4,\) or a number$"),
        ({"beta": [1.0, np.nan, 1, 1]}, ValueError, "^beta: not finite in channel 1$"),
        ({"beta": [[1.0]]}, ValueError, r"^beta: shape was \(1, 1\)"),
        ({"gamma": 1e60}, ValueError, "^matrix: out of the range of float32 in channels 0, 1, 2, 3; dtype="),
        ({"eps": -1.0}, ValueError, "^eps"),
        ({"method": "qr"}, ValueError, "^method"),
        ({"dtype": "float16"}, TypeError, "dtype: was 'float16'"),
        ({"channel_axis": 1.5}, TypeError, "channel_axis"),
    ],
)
def test_refusals_of_from_comoments(rng, change, error, match):
    together = comoments(data(rng, (60, 4), 1))
    with pytest.raises(error, match=match):
        bn.FrozenWhitening.from_comoments(together, **change)


def test_from_comoments_of_too_few_values():
    one = CoMoments(1.0, np.zeros(2), np.zeros((1, 2, 2)))
    none = CoMoments(0.0, np.zeros(2), np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match=r"^comoments: 2 values or more wanted in each channel, found 1$"):
        bn.FrozenWhitening.from_comoments(one)
    with pytest.raises(ValueError, match=r"^comoments: 1 value or more wanted in each channel, found 0$"):
        bn.FrozenWhitening.from_comoments(none, ddof=0)
    assert bn.FrozenWhitening.from_comoments(one, ddof=0, eps=1.0).matrix.tolist() == np.eye(2).tolist()


MOVES = r"^dtype: rounding to float32 moves y by more than 0\.0001 standard deviations in channel"


@pytest.mark.parametrize(
    ("mean", "cov", "channels"),
    [
        ([1e6 + 0.03, 0.0], [[1.0, 0.0], [0.0, 1.0]], " 0;"),
        ([0.1, 3.0], [[1.0, 1 - 1e-11], [1 - 1e-11, 1.0]], "s 0, 1;"),
    ],
)
def test_warns_where_rounding_moves_y_too_far(mean, cov, channels):
    """A mean that float32 does not hold, and a covariance so near to singular that W does not fit into it."""
    together = CoMoments(1001.0, mean, 1000 * np.array([cov]))
    with pytest.warns(UserWarning, match=f"{MOVES}{channels}.* dtype='float64' keeps it") as caught:
        coarse = bn.FrozenWhitening.from_comoments(together, eps=0.0)
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match=MOVES):  # γ scales y and its standard deviation
        bn.FrozenWhitening.from_comoments(together, 1e-6, eps=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(coarse)
        bn.FrozenWhitening.from_comoments(together, eps=0.0, dtype="float64")
        bn.FrozenWhitening.from_comoments(together, 0.0, eps=0.0)
        bn.FrozenWhitening.from_comoments(together, eps=1e6)


def test_what_it_warns_of_is_what_happens(rng):
    """The change of y that is computed is that of data with these statistics."""
    x = rng.normal(size=(5000, 1)) + rng.normal(size=(5000, 3)) * 1e-4 + [0, 1, 2]
    together = comoments(x)
    found = SimpleNamespace()
    for dtype in ("float32", "float64"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer = bn.FrozenWhitening.from_comoments(together, eps=0.0, method="pca", dtype=dtype)
        setattr(found, dtype, (layer, caught))
    narrow, wide = (
        bn.FrozenWhitening(f.matrix, f.mean, dtype="float64") for f, _ in (found.float32, found.float64)
    )
    moved = np.sqrt(np.mean((narrow(x) - wide(x)) ** 2, axis=0))
    assert moved.min() < 1e-4 < moved.max()
    told = [k for k in range(3) if moved[k] > 1e-4]
    assert len(found.float32[1]) == 1
    listed = ", ".join(map(str, told))
    assert f"in channel{'s' if len(told) > 1 else ''} {listed};" in str(found.float32[1][0].message)
    assert found.float64[1] == []
