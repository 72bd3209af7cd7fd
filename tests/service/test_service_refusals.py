"""Every error answer: its status, its `{"error": text}`, and that it shows nothing of the host."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
from serving import CHANNELS, serve

from batchnorm_service import errors
from batchnorm_service.errors import (
    BodyTooLargeError,
    FingerprintMismatchError,
    InvalidInputError,
    ModelNotFoundError,
    NotReadyError,
    UnsupportedEncodingError,
    UnsupportedError,
)
from batchnorm_service.http.error_answers import STATUS

X = np.zeros((2, CHANNELS), np.float32)
OF_MODEL = "/v2/models/planar"
LENGTH = "Inference-Header-Content-Length"


def given(**changes):
    """A request in JSON with members of its input changed; a member `...` is left out."""
    members = {"name": "x", "shape": [2, CHANNELS], "datatype": "FP32", "data": [0.0] * X.size} | changes
    return {"inputs": [{name: value for name, value in members.items() if value is not ...}]}


def whole(**members):
    """A good request with members of its own."""
    return given() | members


def binary(size: Any = X.nbytes, datatype="FP32", **members):
    members = given(data=..., datatype=datatype, parameters={"binary_data_size": size}, **members)
    return members | {"parameters": {"binary_data_output": True}}


def of_output(**members):
    return whole(outputs=[{"name": "y"} | members])


def number(text: str):
    return json.dumps(given(data=[*[0.0] * (X.size - 1), "NUMBER"])).replace('"NUMBER"', text).encode()


class Case(NamedTuple):
    label: str
    error: type[errors.ServiceError]
    reason: str
    message: Any = None
    tail: bytes = b""
    headers: dict[str, str] | None = None
    path: str = OF_MODEL + "/infer"
    method: str = "POST"


def invalid(label, reason, message=None, tail=b"", headers=None, **options):
    return Case(label, InvalidInputError, reason, message, tail, headers, **options)


def at(path, error, reason, method="GET"):
    return Case(f"{method} {path}", error, reason, path=path, method=method)


DEEP = b'{"unknown":' + b"[" * 100 + b"]" * 100 + b"}"
BAD_LENGTHS = ("-1", "+5", "abc", "1e3", "0x10", "5.0", "1" * 30, "", "1_0")

CASES = [
    # framing
    invalid("no body", "the body is empty", b""),
    invalid("not json", "malformed", b"hello"),
    invalid("cut json", "malformed", b'{"inputs":['),
    invalid("bytes after json", "needs Inference-Header", json.dumps(given()).encode() + b"\0\0"),
    invalid("bytes alone", "needs Inference-Header", X.tobytes()),
    invalid("bytes that are text", "needs Inference-Header", json.dumps(binary()).encode() + b"text" * 10),
    invalid("not utf-8", "malformed", b'{"inputs":"\xff"}'),
    invalid(
        "a byte-order mark", "byte-order mark (EF BB BF)", b"\xef\xbb\xbf" + json.dumps(given()).encode()
    ),
    invalid("utf-16", "malformed", json.dumps(given()).encode("utf-16")),
    invalid("not an object", "must be an object", b"[1]"),
    invalid("deeper than 100", "nested deeper", DEEP),
    invalid("very deep", "nested deeper", b"[" * 100_000),
    invalid("deep objects", "nested deeper", b'{"a":' * 101 + b"1" + b"}" * 101),
    *(invalid(f"length {text!r}", LENGTH, given(), headers={LENGTH: text}) for text in BAD_LENGTHS),
    invalid("length beyond body", LENGTH, given(), headers={LENGTH: "100000"}),
    invalid("length cuts json", "malformed", given(), headers={LENGTH: "20"}),
    invalid("length 0 with json", "raw takes a multiple", b"{ }", headers={LENGTH: "0"}),
    invalid(
        "raw, two free sizes",
        "one free size",
        X.tobytes(),
        headers={LENGTH: "0"},
        path="/v2/models/third/infer",
    ),
    # request
    invalid("no inputs", "inputs must be", {}),
    invalid("null inputs", "inputs must be", {"inputs": None}),
    invalid("inputs an object", "inputs must be", {"inputs": {}}),
    invalid("empty inputs", "inputs must be", {"inputs": []}),
    invalid("two inputs", "inputs must be", {"inputs": given()["inputs"] * 2}),
    invalid("input a string", "inputs must be", {"inputs": ["x"]}),
    invalid("wrong input name", "is 'x', got 'z'", given(name="z")),
    invalid("no input name", "is 'x', got None", given(name=...)),
    invalid("id half a pair", "malformed", whole(id="\ud800")),
    invalid("id a number", "id must be a string", whole(id=1)),
    invalid("parameters a list", "parameters must be an object", whole(parameters=[])),
    invalid(
        "binary_data_output 1", "binary_data_output must be true", whole(parameters={"binary_data_output": 1})
    ),
    invalid("outputs an object", "outputs must be", whole(outputs={})),
    invalid("two outputs", "outputs must be", whole(outputs=[{"name": "y"}] * 2)),
    invalid("output a string", "outputs must be", whole(outputs=["y"])),
    invalid("wrong output name", "is 'y', got 'z'", of_output(name="z")),
    invalid(
        "binary_data null string", "binary_data must be true", of_output(parameters={"binary_data": "no"})
    ),
    # input
    invalid("no shape", "shape must be", given(shape=...)),
    invalid("negative size", "shape must be", given(shape=[-2, CHANNELS])),
    invalid("fractional size", "shape must be", given(shape=[2.0, CHANNELS])),
    invalid("size true", "shape must be", given(shape=[True, CHANNELS])),
    invalid("size beyond 64 bits", "shape must be", given(shape=[2**63, CHANNELS])),
    invalid("size of 4000 digits", "shape must be", given(shape=[10**4000, CHANNELS])),
    invalid("rank 65", "shape must be", given(shape=[1] * 65)),
    invalid("shape a number", "shape must be an array", given(shape=10)),
    invalid("overflowing shape", "shape", given(shape=[2**62, 2**62, CHANNELS])),
    invalid("absurd empty shape", "too big", given(shape=[0, CHANNELS, 2**62], data=[])),
    invalid("rank 1", "x", given(shape=[X.size])),
    invalid("rank 0", "x", given(shape=[], data=[1.0])),
    invalid("wrong channels", "x", given(shape=[CHANNELS, 2])),
    invalid("no datatype", "datatype must be one of FP32, FP64, FP16, BF16", given(datatype=...)),
    invalid("unknown datatype", "datatype must be one of", given(datatype="FP8")),
    invalid("integers", "datatype must be one of", given(datatype="INT32")),
    invalid(
        "float64 for a float32 layer", "datatype must be one of FP32, FP16, BF16", given(datatype="FP64")
    ),
    invalid("datatype a number", "datatype must be a string", given(datatype=32)),
    invalid("no data", "either data or binary_data_size", given(data=...)),
    # JSON data
    invalid("data a string", "data must be an array", given(data="0")),
    invalid("too few numbers", "numbers wanted", given(data=[0.0] * (X.size - 1))),
    invalid("too many numbers", "numbers wanted", given(data=[0.0] * (X.size + 1))),
    invalid("strings", "got a string", given(data=["0"] * X.size)),
    invalid("booleans", "got true or false", given(data=[True] * X.size)),
    invalid("objects", "got an object", given(data=[{}] * X.size)),
    invalid("a list among numbers", "nesting does not match", given(data=[*[0.0] * (X.size - 1), [0.0]])),
    invalid("numbers among lists", "nesting does not match", given(data=[[0.0] * CHANNELS, 0.0])),
    invalid("ragged", "nesting does not match", given(data=[[0.0] * CHANNELS, [0.0]])),
    invalid("nested transposed", "nesting does not match", given(data=[[0.0] * 2] * CHANNELS)),
    invalid("nested too deep", "nesting does not match", given(data=[[[0.0]] * CHANNELS] * 2)),
    invalid("beyond float64", "beyond the range", number("1e400")),
    invalid("integer beyond float64", "beyond the range", number("1" + "0" * 400)),
    invalid("integer of 5000 digits", "beyond the range", number("1" * 5000)),
    invalid("beyond float32", "beyond the range of FP32", number("3.5e38")),
    invalid("negative beyond float32", "beyond the range of FP32", number("-1e39")),
    invalid("unknown token", "malformed", number("nan")),
    invalid(
        "FP16 in JSON",
        "not read from JSON",
        given(datatype="FP16") | {"parameters": {"binary_data_output": True}},
    ),
    invalid(
        "BF16 in JSON",
        "not read from JSON",
        given(datatype="BF16") | {"parameters": {"binary_data_output": True}},
    ),
    invalid("FP16 as JSON", "not written as JSON", binary(20, "FP16") | {"parameters": {}}, b"\0" * 20),
    invalid("BF16 as JSON", "not written as JSON", binary(20, "BF16") | {"parameters": {}}, b"\0" * 20),
    # binary data
    invalid("data and binary", "either data or", given(parameters={"binary_data_size": 40}), X.tobytes()),
    invalid("too few bytes", "39 bytes follow", binary(), X.tobytes()[:-1]),
    invalid("too many bytes", "41 bytes follow", binary(), X.tobytes() + b"\0"),
    invalid("no bytes", "0 bytes follow", binary()),
    invalid("bytes after JSON data", "4 bytes follow", given(), b"\0" * 4),
    invalid("size not of shape", "40 bytes wanted", binary(36), X.tobytes()[:36]),
    invalid("size not of datatype", "20 bytes wanted", binary(40, "FP16"), X.tobytes()),
    invalid("negative size in bytes", "bytes follow", binary(-40), X.tobytes()),
    invalid("fractional bytes", "binary_data_size must be an integer", binary(40.0), X.tobytes()),
    invalid("bytes true", "binary_data_size must be an integer", binary(True), X.tobytes()),
    # not offered
    Case("classification", UnsupportedError, "classification", of_output(parameters={"classification": 1})),
    Case(
        "shared input",
        UnsupportedError,
        "shared_memory",
        given(data=..., parameters={"shared_memory_region": "a"}),
    ),
    Case(
        "shared output",
        UnsupportedError,
        "shared_memory",
        of_output(parameters={"shared_memory_region": "a"}),
    ),
    Case(
        "unknown encoding",
        UnsupportedEncodingError,
        "Content-Encoding",
        given(),
        headers={"Content-Encoding": "zstd"},
    ),
    # models
    *(
        at(f"/v2/models/{name}{end}", ModelNotFoundError, "no model", method)
        for name in (
            "nobody",
            "..",
            "%2e%2e",
            "n" * 200,
            "planar/versions/3",
            "planar/versions/..",
            "a%00b",
        )
        for end, method in (
            ("", "GET"),
            ("/ready", "GET"),
            ("/config", "GET"),
            ("/stats", "GET"),
            ("/infer", "POST"),
        )
    ),
    *(
        at(f"/v2/models/stats/{end}", ModelNotFoundError, "no model", method)
        for end, method in (("ready", "GET"), ("infer", "POST"))
    ),
    Case(
        "another fingerprint",
        FingerprintMismatchError,
        "demands fingerprint '0000",
        whole(parameters={"fingerprint": "0" * 64}),
    ),
    invalid("fingerprint a number", "fingerprint must be a string", whole(parameters={"fingerprint": 0})),
    *(
        at(f"/v2/models/{name}{end}", NotReadyError, "could not be loaded", method)
        for name in ("broken", "planar/versions/11", "link")
        for end, method in (("", "GET"), ("/ready", "GET"), ("/infer", "POST"))
    ),
    # limits: a length that is only announced
    Case("too large", BodyTooLargeError, "67108864", b"", headers={"Content-Length": str(64 * 2**20 + 1)}),
    Case("absurdly large", BodyTooLargeError, "67108864", b"", headers={"Content-Length": str(10**15)}),
]


def assert_error(answer, status, hidden=()):
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    content = answer.json()
    assert list(content) == ["error"]
    assert isinstance(content["error"], str)
    assert content["error"]
    assert len(content["error"]) < 2000
    for shown in ("Traceback", ".py", ".safetensors", "site-packages", *hidden):
        assert shown not in content["error"]
    return content["error"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_refusal(server, models, case):
    body = case.message
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {LENGTH: str(len(body))} if case.tail else {}
    body = (body or b"") + case.tail if case.method == "POST" else None
    answer = server.request(case.method, case.path, body, headers | (case.headers or {}))
    error = assert_error(answer, STATUS[case.error], hidden=[str(models)])
    assert case.reason in error


def subclasses(kind):
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_the_table_is_whole_and_wholly_tested():
    every = subclasses(errors.ServiceError) - {errors.ServiceError}
    assert len(every) == 12
    assert set(STATUS) == every
    elsewhere = {
        errors.LoadError, errors.LaggingError,  # test_service_repository.py
        errors.UnauthorizedError, errors.ForbiddenError,  # test_service_keys.py
        errors.OverloadedError,  # test_service_limits.py
    }  # fmt: skip
    assert {case.error for case in CASES} == every - elsewhere
    assert len({case.label for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v2/models/", 404),
        ("GET", "/v2/models/a/b", 404),
        ("GET", "/v2/models/a%2Fb", 404),
        ("GET", "/v2/models/a/versions", 404),
        ("GET", "/v2/models/planar/ready/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v2/repository/index", 405),
        ("GET", OF_MODEL + "/infer", 405),
        ("PUT", OF_MODEL + "/infer", 405),
        ("POST", "/v2", 405),
        ("DELETE", OF_MODEL, 405),
    ],
)
def test_paths_and_verbs(server, method, path, status):
    answer = server.request(method, path)
    assert_error(answer, status)
    assert ("Allow" in answer.headers) == (status == 405)


def test_no_model_is_not_ready(tmp_path):
    (tmp_path / "models").mkdir()
    with serve(tmp_path / "log", str(tmp_path / "models")) as server:
        assert server.request("GET", "/v2/health/live").json() == {"live": True}
        assert server.request("GET", "/v2/models").json() == {"models": []}
        assert "no model" in assert_error(server.request("GET", "/v2/health/ready"), 503)
        assert "not be ready" in server.log


def test_defects_and_bad_parameters(tmp_path, models):
    """Errors that no request can provoke: an unexpected exception, and a parameter that FastAPI rejects."""
    script = tmp_path / "defect.py"
    script.write_text(
        "import sys, uvicorn\n"
        "from batchnorm_service.http.app import create_app\n"
        "from batchnorm_service.settings import Settings\n"
        "async def defect() -> None: raise RuntimeError('secret')\n"
        "async def typed(number: int) -> int: return number\n"
        "app = create_app(Settings(models=sys.argv[1]))\n"
        "app.add_api_route('/defect', defect)\n"
        "app.add_api_route('/typed/{number}', typed)\n"
        "uvicorn.run(app, port=0)\n"
    )
    with serve(tmp_path / "log", str(models), command=(str(script),)) as server:
        assert "secret" not in assert_error(server.request("GET", "/defect"), 500)
        server.wait_for_log("RuntimeError: secret")
        assert server.request("GET", "/typed/7").json() == 7
        assert "number" in assert_error(server.request("GET", "/typed/seven"), 422)
