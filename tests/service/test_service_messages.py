"""Messages that must be understood, byte for byte where the protocol fixes the bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from serving import CHANNELS

from batchnorm_service.protocol.tensors import cut_data, put_data, shaped

X = np.arange(2 * CHANNELS, dtype=np.float32).reshape(2, CHANNELS)


def message(x=X, **changes):
    """A JSON request for x, flat, with members of the input or (in `request`) of the request changed."""
    request = changes.pop("request", {})
    given = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()} | changes
    return {"inputs": [given]} | request


def values(answer, dtype=np.float32):
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    (output,) = answer.json()["outputs"]
    return np.array(output["data"], dtype).reshape(output["shape"])


def test_the_exact_binary_exchange(server, layers):
    """The bytes that tritonclient 2.73 sends and accepts."""
    y = layers["planar"](X)
    head = (
        b'{"id":"42","inputs":[{"name":"x","shape":[2,5],"datatype":"FP32","parameters":{"binary_data_size":40}}],'
        b'"outputs":[{"name":"y","parameters":{"binary_data":true}}]}'
    )
    answer = server.infer("planar", head, X.tobytes())
    length = int(answer.headers["Inference-Header-Content-Length"])
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Batchnorm-Fingerprint"] == layers["planar"].fingerprint
    assert answer.body[:length].rstrip() == (
        b'{"id":"42","model_name":"planar","model_version":"10","outputs":[{"name":"y","datatype":"FP32",'
        b'"shape":[2,5],"parameters":{"binary_data_size":40}}]}'
    )
    assert answer.body[length:] == y.tobytes()


def test_the_tensor_of_a_binary_answer_begins_on_eight_bytes(server, layers):
    for letters in range(8):
        request = {"id": "i" * letters, "parameters": {"binary_data_output": True}}
        answer = server.infer("planar", message(request=request))
        length = int(answer.headers["Inference-Header-Content-Length"])
        assert (length % 8, answer.body[length:]) == (0, layers["planar"](X).tobytes())


def test_the_exact_json_exchange(server, layers):
    answer = server.infer("planar", message(request={"id": "42"}))
    expected = layers["planar"](X)
    assert answer.headers["Batchnorm-Fingerprint"] == layers["planar"].fingerprint
    assert "Inference-Header-Content-Length" not in answer.headers
    assert answer.body.startswith(
        b'{"id":"42","model_name":"planar","model_version":"10",'
        b'"outputs":[{"name":"y","datatype":"FP32","shape":[2,5],"data":['
    )
    assert values(answer).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "application/octet-stream", "text/plain; a=b"]
)
@pytest.mark.parametrize("with_length", [False, True])
def test_content_type_is_ignored(server, layers, content_type, with_length):
    text = json.dumps(message()).encode()
    headers = {} if content_type is None else {"Content-Type": content_type}
    if with_length:  # perf_analyzer sends it with plain JSON too
        headers["Inference-Header-Content-Length"] = str(len(text))
    assert values(server.infer("planar", text, headers=headers)).tobytes() == layers["planar"](X).tobytes()


def test_a_chunked_body(server, layers):
    text = json.dumps(message()).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (text[:7], text[7:], b""))
    answer = server.raw(
        b"POST /v2/models/planar/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    )
    assert values(answer).tobytes() == layers["planar"](X).tobytes()


@pytest.mark.parametrize(
    "request_members",
    [
        {"model_name": "other", "unknown": {"deep": [[[1]]]}},
        {"id": None, "parameters": None, "outputs": None},
        {"outputs": []},
        {"outputs": [{"name": "y"}]},
        {"parameters": {"priority": 1, "content_type": "np"}},
    ],
)
def test_members_that_change_nothing(server, layers, request_members):
    answer = server.infer("planar", message(request=request_members, parameters={"content_type": "np"}))
    assert values(answer).tobytes() == layers["planar"](X).tobytes()
    assert "id" not in answer.json()


@pytest.mark.parametrize("name", ["a", 'é\n"\\', "x" * 3000])
def test_the_id_comes_back(server, name):
    assert server.infer("planar", message(request={"id": name})).json()["id"] == name


def test_an_empty_id_is_none(server):
    assert "id" not in server.infer("planar", message(request={"id": ""})).json()


@pytest.mark.parametrize(
    ("of_request", "of_output", "binary"),
    [
        (None, None, False),
        (True, None, True),
        (False, None, False),
        (None, True, True),
        (True, False, False),
        (False, True, True),
    ],
)
def test_the_flag_of_the_output_overrides_that_of_the_request(server, of_request, of_output, binary):
    request = {} if of_request is None else {"parameters": {"binary_data_output": of_request}}
    request["outputs"] = [
        {"name": "y", "parameters": {} if of_output is None else {"binary_data": of_output}}
    ]
    answer = server.infer("planar", message(request=request))
    assert answer.status == 200
    assert ("Inference-Header-Content-Length" in answer.headers) == binary


@pytest.mark.parametrize(
    "shape", [(2, CHANNELS), (0, CHANNELS), (2, CHANNELS, 3), (2, CHANNELS, 0), (1, CHANNELS, 2, 2)]
)
def test_nested_and_flat_data(server, layers, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for data in (x.tolist(), x.ravel().tolist()):
        answer = server.infer("planar", message(x, data=data))
        assert values(answer).tobytes() == layers["planar"](x).tobytes()
        assert answer.json()["outputs"][0]["shape"] == list(shape)


def test_tokens_null_and_integers(server, layers):
    text = json.dumps(message(data="DATA")).replace(
        '"DATA"', "[NaN, Infinity, -Infinity, null, 1, -0.0, 1e-400, 18446744073709551616, 3.4028235e38, 1e2]"
    )
    x = np.array([np.nan, np.inf, -np.inf, np.nan, 1, -0.0, 0, 2**64, 3.4028235e38, 100], np.float32).reshape(
        2, 5
    )
    answer = server.infer("planar", text.encode())
    with np.errstate(over="ignore", invalid="ignore"):
        expected = layers["planar"](x)
    assert np.array_equal(values(answer), expected, equal_nan=True)
    assert b"NaN" in answer.body
    assert b"Infinity" in answer.body
    assert b"null" not in answer.body


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("model", ["planar", "last", "wide"])
def test_a_raw_request(server, layers, model, rows):
    x = np.random.default_rng(0).normal(size=(rows, CHANNELS)).astype(layers[model].dtype)
    headers = {"Inference-Header-Content-Length": "0"}
    answer = server.request("POST", f"/v2/models/{model}/infer", x.tobytes(), headers)
    length = int(answer.headers["Inference-Header-Content-Length"])
    assert answer.status == 200
    assert json.loads(answer.body[:length])["outputs"][0]["shape"] == [rows, CHANNELS]
    assert answer.body[length:] == layers[model](x).tobytes()


def test_json_as_deep_as_allowed(server):
    def nested(depth):
        return json.loads("[" * depth + "]" * depth)

    assert server.infer("planar", message(request={"unknown": nested(99)})).status == 200
    text = message(request={"unknown": '[{"' * 300})  # brackets in a string are no depth
    assert server.infer("planar", text).status == 200


def test_health_and_paths(server):
    assert server.request("GET", "/v2/health/live").json()["live"] is True
    ready = server.request("GET", "/v2/health/ready").json()
    assert ready["ready"] is True
    assert server.request("GET", "/v2").body == server.request("GET", "/v2/").body
    assert server.request("GET", "/v2/models").json() == {
        "models": ["last", "planar", "third", "wide", "wide-last"]
    }
    for path in ("/v2/models/planar/ready", "/v2/models/planar/versions/2/ready"):
        assert server.request("GET", path).json() == {"name": "planar", "ready": True}


# Below: the numbers themselves, without a process.


def numbers_to_json(x):
    return bytes(put_data(b"", x, b""))


def read(text):
    """As clients do: by way of float64."""
    return np.array(json.loads(text), np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_survive_json(dtype):
    x = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64).view(dtype)
    x = x[np.isfinite(x)]
    assert read(numbers_to_json(x)).astype(dtype).tobytes() == x.tobytes()
    datatype = {np.float32: b"FP32", np.float64: b"FP64"}[dtype]
    text = b'{"inputs":[{"datatype":"%b","data":%b}]}'
    rest, (found,) = cut_data(text % (datatype, numbers_to_json(x)), x.size, 100)
    assert rest == text % (datatype, b"[0]")
    assert shaped(found, x.shape).tobytes() == x.tobytes()


def test_the_float32_whose_shortest_text_is_misread():
    x = np.array([0x15AE43FD, 0x95AE43FD], np.uint32).view(np.float32)
    assert read(b"[7.038531e-26]").astype(np.float32)[0] != x[0]
    assert read(numbers_to_json(x)).astype(np.float32).tobytes() == x.tobytes()
    with_nan = np.append(x, np.float32(np.nan))
    assert read(numbers_to_json(with_nan)).astype(np.float32)[:2].tobytes() == x.tobytes()


@pytest.mark.long
def test_one_float32_in_97_survives_json():
    step = 97 << 20
    for start in range(0, 0x7F800000, step):
        x = np.arange(start, min(start + step, 0x7F800000), 97, dtype=np.uint32).view(np.float32)
        assert read(numbers_to_json(x)).astype(np.float32).tobytes() == x.tobytes(), hex(start)
