"""Arrays of numbers cut out of JSON: what is taken, what is refused, and that the rest of the text stays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from batchnorm_service.errors import BodyTooLargeError, InvalidInputError
from batchnorm_service.protocol.tensors import cut_data, numbers_from_json, put_data

SHAPES = nps.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=4)


def request(data):
    return b'{"inputs":[{"data":%b}]}' % data


def cut(data, limit=10**6):
    _, (numbers,) = cut_data(request(data), limit)
    return numbers


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["f4", "f8"]).flatmap(lambda dtype: nps.arrays(dtype, SHAPES)), st.booleans())
def test_any_array_comes_through(x, flat):
    data = json.dumps(x.ravel().tolist() if flat else x.tolist()).encode()
    y = numbers_from_json(cut(data), x.shape, {"f4": "FP32", "f8": "FP64"}[x.dtype.str[1:]])
    assert y.shape == x.shape
    assert np.array_equal(y, x, equal_nan=True)
    assert np.array_equal(np.signbit(y[~np.isnan(x)]), np.signbit(x[~np.isnan(x)]))
    again = cut(bytes(put_data(b"", x, b"")))
    assert numbers_from_json(again, x.shape, "FP64").astype(x.dtype).tobytes() == y.tobytes()


@pytest.mark.parametrize(
    ("text", "rest", "arrays"),
    [
        (b' {"inputs" : [ {"data" : [1 , 2] , "a":[3]} ]}\n', b' {"inputs" : [ {"data" : [0] , "a":[3]} ]}\n',
         [[1, 2]]),
        # Names are compared as they read.
        (rb'{"in\u0070uts":[{"d\u0061ta":[1]}]}', rb'{"in\u0070uts":[{"d\u0061ta":[0]}]}', [[1]]),
        # Of two members of a name the last is meant: both are cut, and each is known by its number.
        (b'{"inputs":[{"data":[1],"data":[2]}],"inputs":[{"data":[3]}]}',
         b'{"inputs":[{"data":[0],"data":[1]}],"inputs":[{"data":[2]}]}', [[1], [2], [3]]),
        # Elsewhere nothing is cut.
        (b'{"data":[1],"inputs":{"data":[2]}}', None, []),
        (b'{"inputs":[[{"data":[1]}],{"x":{"data":[2]}}],"outputs":[{"data":[3]}]}', None, []),
        (b'{"inputs":[{"data":"[1]"},{"data":null},{"data":1}]}', None, []),
        (b"[1]", None, []),
        (b'"inputs"', None, []),
    ],
)  # fmt: skip
def test_what_is_cut(text, rest, arrays):
    for given_text in (text, memoryview(bytearray(text))):
        left, found = cut_data(given_text, 100)
        assert left == (text if rest is None else rest)
        assert [numbers.float64().tolist() for numbers in found] == arrays


@pytest.mark.parametrize(
    "data",
    [*b"[1,[2]] [[1],2] [[],2] [[1,2],[3]] [[],[3]] [[[1]],[2]] [[],[[]]] [[1],[[]]] [[[]],[1]]".split(),
     b"[" * 65 + b"]" * 65],
)  # fmt: skip
def test_ragged(data):
    with pytest.raises(InvalidInputError, match="nested otherwise"):
        cut(data)


@pytest.mark.parametrize(
    "data",
    [*b"[1 [1, [1,] [,1] [01] [+1] [.5] [1.] [1e] [0x1] [1_0] [nan] [inf] [-NaN] [Infinit] [--1]".split(),
     *b"[nul] [1]] [[1] [1}".split(), b"[1 2]", b"[\x001]", b"[\xef\xbb\xbf1]"],
)  # fmt: skip
def test_malformed(data):
    with pytest.raises(InvalidInputError, match="malformed"):
        cut(data)


def test_ranges():
    assert cut(b"[1e308,-1e-400,5e-324]").float64().tolist() == [1e308, -0.0, 5e-324]
    assert np.isinf(cut(b"[Infinity,-Infinity]").float32()).all()
    for number in (b"1e309", b"-1e309", b"1" + b"0" * 400, b"1" * 5000):
        with pytest.raises(InvalidInputError, match="beyond the range of float64"):
            cut(b"[0,%b]" % number)
    largest = np.finfo(np.float32).max
    assert cut(b"[3.4028235e38]").float32() == largest
    assert cut(b"[3.4028235677973362e38]").float32() == largest  # the last float64 that rounds to it
    with pytest.raises(InvalidInputError, match="beyond the range of FP32"):
        numbers_from_json(cut(b"[3.4028235677973366e38]"), (1,), "FP32")


def test_the_number_of_elements_is_limited():
    assert len(cut(b"[1,2,3]", 3)) == 3
    for data in (b"[1,2,3,4]", b"[[1,2],[3,4]]", b"[1,2,3,4"):
        with pytest.raises(BodyTooLargeError, match="more numbers"):
            cut(data, 3)
    with pytest.raises(BodyTooLargeError):
        cut_data(b'{"inputs":[{"data":[1,2]},{"data":[1,2]}]}', 3)
