"""Arrays of numbers cut out of JSON: valid and invalid ones, and that the rest of the text stays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from batchnorm_service.errors import BodyTooLargeError, InvalidInputError
from batchnorm_service.protocol.tensors import cut_data, parse_json, put_data, shaped

SHAPES = nps.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=4)


def cut(data, limit=10**6, datatype=b"FP64"):
    text = b'{"inputs":[{"datatype":"%b","data":%b}]}' % (datatype, data)
    _, (found,) = cut_data(text, limit, 100)
    return found


def numbers(data, **options):
    values, _ = cut(data, **options)
    return values


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["f4", "f8"]).flatmap(lambda dtype: nps.arrays(dtype, SHAPES)), st.booleans())
def test_any_array_comes_through(x, flat):
    data = json.dumps(x.ravel().tolist() if flat else x.tolist()).encode()
    y = shaped(cut(data, datatype={"f4": b"FP32", "f8": b"FP64"}[x.dtype.str[1:]]), x.shape)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert np.array_equal(y, x, equal_nan=True)
    assert np.array_equal(np.signbit(y[~np.isnan(x)]), np.signbit(x[~np.isnan(x)]))
    again = cut(bytes(put_data(b"", x, b"")))
    assert shaped(again, x.shape).astype(x.dtype).tobytes() == y.tobytes()


@pytest.mark.parametrize(
    ("text", "rest", "arrays"),
    [
        (b' {"inputs" : [ {"data" : [1 , 2] , "a":[3]} ]}\n', b' {"inputs" : [ {"data" : [0] , "a":[3]} ]}\n',
         [[1, 2]]),
        # Names are compared as they read.
        (rb'{"in\u0070uts":[{"d\u0061ta":[1]}]}', rb'{"in\u0070uts":[{"d\u0061ta":[0]}]}', [[1]]),
        # If two members have one name, the last counts: both are cut, and each is known by its number.
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
        left, found = cut_data(given_text, 100, 100)
        assert left == (text if rest is None else rest)
        assert [values.tolist() for values, _ in found] == arrays


@pytest.mark.parametrize(
    "data",
    [*b"[1,[2]] [[1],2] [[],2] [[1,2],[3]] [[],[3]] [[[1]],[2]] [[],[[]]] [[1],[[]]] [[[]],[1]]".split(),
     b"[" * 65 + b"]" * 65],
)  # fmt: skip
def test_ragged(data):
    with pytest.raises(InvalidInputError, match="nesting does not match"):
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
    assert numbers(b"[1e308,-1e-400,5e-324]").tolist() == [1e308, -0.0, 5e-324]
    assert np.isinf(numbers(b"[Infinity,-Infinity]", datatype=b"FP32")).all()
    for number in (b"1e309", b"-1e309", b"1" + b"0" * 400, b"1" * 5000):
        with pytest.raises(InvalidInputError, match="beyond the range of float64"):
            cut(b"[0,%b]" % number)
    largest = np.finfo(np.float32).max
    assert numbers(b"[3.4028235e38]", datatype=b"FP32") == largest
    # The last float64 that rounds to it, and the next.
    assert numbers(b"[3.4028235677973362e38]", datatype=b"FP32") == largest
    with pytest.raises(InvalidInputError, match="beyond the range of FP32"):
        cut(b"[3.4028235677973366e38]", datatype=b"FP32")


def test_the_number_of_elements_is_limited():
    assert numbers(b"[1,2,3]", limit=3).size == 3
    for data in (b"[1,2,3,4]", b"[[1,2],[3,4]]", b"[1,2,3,4"):
        with pytest.raises(BodyTooLargeError, match="more numbers"):
            cut(data, limit=3)
    with pytest.raises(BodyTooLargeError):
        cut_data(b'{"inputs":[{"data":[1,2]},{"data":[1,2]}]}', 3, 100)


def test_many_arrays_take_no_memory():
    """An array must not reserve memory for all numbers that might follow: 6 MB of text took a terabyte."""
    with pytest.raises(InvalidInputError, match="more than 64 arrays"):
        cut_data(b'{"inputs":[%b{}]}' % (b'{"data":[1]},' * 500_000), 10**9, 100)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b' {"a": [1, -2, 0.5, 1e2, true, false, null]} ', {"a": [1, -2, 0.5, 100.0, True, False, None]}),
        (b'{"a": 1, "b": 2, "a": 3}', {"a": 3, "b": 2}),
        (rb'"\u00e9\ud834\udd1e\"\\\/\b\f\n\r\t"', 'é𝄞"\\/\b\f\n\r\t'),
        (b"[Infinity, -Infinity]", [float("inf"), float("-inf")]),
        (b"[9223372036854775807, -9223372036854775808, 18446744073709551616]", [2**63 - 1, -(2**63), 2**64]),
        (b"1" * 4300, int("1" * 4300)),
    ],
)  # fmt: skip
def test_a_head_becomes_objects(text, value):
    found = parse_json(text, 100)
    assert found == value
    assert repr(found) == repr(value)  # 1 == 1.0 == True


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "a value is expected, at line 1 column 1"),
        (b'{"a":\n1,}', "a name in quotes is expected, at line 2 column 3"),
        (rb'"\ud800"', "an escape in a string stands for no character"),
        (b'"\xff"', "a string is not UTF-8"),
        (b"1e400", "a number is beyond the range of float64"),
        (b"1" * 4301, "an integer has more than 4300 digits"),
        (b"[" * 101, "nested deeper than 100 levels"),
        (b"\xef\xbb\xbf{}", r"begins with a byte-order mark \(EF BB BF\); send UTF-8 without it"),
    ],
)  # fmt: skip
def test_a_head_that_is_none(text, reason):
    with pytest.raises(InvalidInputError, match=reason):
        parse_json(text, 100)
