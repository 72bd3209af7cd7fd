"""Hostile input: messages with wrong framing, ambiguous HTTP, clients that leave.

Whatever is sent, the answer is an error in the documented form, or the right tensor for that very message.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
from contextlib import closing

import ml_dtypes
import numpy as np
import pytest
from serving import CHANNELS

LENGTH = "Inference-Header-Content-Length"
DTYPES = {"FP32": "f4", "FP64": "f8", "FP16": "f2", "BF16": ml_dtypes.bfloat16}
REFUSALS = {400, 409, 413, 501}
MODELS = ("planar", "last", "wide")
NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"2",
    b"5",
    b"39",
    b"1e400",
    b"NaN",
    b"-Infinity",
    b"null",
    b"18446744073709551616",
    b"1.5",
)
PIECES = (
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"\\",
    b"\0",
    b"\xff",
    b" " * 99,
    b"[" * 200,
    b'"data":[1],',
    b"true",
)


def base(rng, serial):
    """A good message; its tensor holds numbers that those around it do not have, all in the range of FP16."""
    model = rng.choice(MODELS)
    datatype = rng.choice([*DTYPES] if model == "wide" else ["FP32", "FP16", "BF16"])
    rows, inner = rng.randrange(4), rng.choice([(), (2,), (1, 3)])
    shape = (rows, *inner, CHANNELS) if model == "last" else (rows, CHANNELS, *inner)
    x = (np.arange(np.prod(shape)) + serial % 60_000).reshape(shape).astype(DTYPES[datatype])
    given = {"name": "x", "shape": shape, "datatype": datatype}
    message = {"inputs": [given]}
    if datatype in ("FP32", "FP64") and rng.random() < 0.5:
        given["data"] = [float(value) for value in x.ravel()]
        text, tail = json.dumps(message).encode(), b""
    else:
        given["parameters"] = {"binary_data_size": x.nbytes}
        message["parameters"] = {"binary_data_output": datatype in ("FP16", "BF16") or rng.random() < 0.8}
        text, tail = json.dumps(message).encode(), x.tobytes()
    return model, text, tail, str(len(text))


def mutated(rng, text, tail, length):
    """One to three changes, of the JSON, the bytes or the length between them."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(9)
        at = rng.randrange(len(text) + 1)
        if kind == 0:
            text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + rng.randrange(20) :]
        elif kind == 3:
            found = list(re.finditer(rb"-?\d+(\.\d+)?", text)) or [re.match(b"", text)]
            number = rng.choice(found)
            text = text[: number.start()] + rng.choice(NUMBERS) + text[number.end() :]
        elif kind == 4:
            words = [*DTYPES, "INT32", "x", "y", "data", "inputs", "shape"]
            old, new = rng.sample(words, 2)
            text = text.replace(old.encode(), new.encode())
        elif kind == 5:
            tail = tail[: rng.randrange(len(tail) + 1)]
        elif kind == 6:
            tail += rng.randbytes(rng.randrange(1, 50))
        elif kind == 7:
            length = str(len(text) + rng.randrange(-9, 10))
        else:
            length = rng.choice(
                ["0", "-1", "1e3", "", "9" * 30, " 7", "0x10", str(len(text + tail)), str(len(text))]
            )
        if kind < 5 and rng.random() < 0.8:
            length = str(len(text))
    return text, tail, length


@np.errstate(all="ignore")
def assert_right(layer, body, length, answer, headers):
    """The answer to an accepted message is right for the tensor that an independent parser reads from it."""
    if length == "0":
        x = np.frombuffer(body, layer.dtype).reshape(-1, CHANNELS)
    else:
        end = len(body) if length is None else int(length)
        given = json.loads(body[:end])["inputs"][0]
        dtype = np.dtype(DTYPES[given["datatype"]])
        if given.get("data") is None:
            x = np.frombuffer(body[end:], dtype).reshape(given["shape"])
        else:
            x = np.array(given["data"], float).astype(dtype).reshape(given["shape"])
    expected = layer(x)
    if LENGTH in headers:
        cut = int(headers[LENGTH])
        (output,) = json.loads(answer[:cut])["outputs"]
        y = np.frombuffer(answer[cut:], x.dtype).reshape(output["shape"])
    else:
        (output,) = json.loads(answer)["outputs"]
        y = np.array(output["data"], float).astype(x.dtype).reshape(output["shape"])
    assert y.shape == expected.shape
    assert np.array_equal(y.astype(float), expected.astype(float), equal_nan=True)


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_messages_that_lie(server, layers, count, capsys):
    rng = random.Random(count)
    seen = {}
    with closing(http.client.HTTPConnection(server.host, server.port, timeout=20)) as connection:
        for serial in range(count):
            model, *good = base(rng, serial)
            text, tail, length = mutated(rng, *good) if serial % 10 else good
            headers = {} if rng.random() < 0.05 else {LENGTH: length}
            connection.request("POST", f"/v2/models/{model}/infer", text + tail, headers)
            response = connection.getresponse()
            answer = response.read()
            seen[response.status] = seen.get(response.status, 0) + 1
            if response.status == 200:
                given = headers.get(LENGTH)
                assert_right(layers[model], text + tail, given, answer, response.headers)
            else:
                assert response.status in REFUSALS, (text, tail, headers, answer)
                assert list(json.loads(answer)) == ["error"]
    with capsys.disabled():
        print(f"\n{count} messages: " + ", ".join(f"{n} × {status}" for status, n in sorted(seen.items())))
    assert sum(seen.values()) == count
    assert seen[200] > count // 8
    assert seen[400] > count // 3
    assert "Traceback" not in server.log


GOOD = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, CHANNELS], "datatype": "FP32", "data": [1.0] * CHANNELS}]}
).encode()
INFER = b"POST /v2/models/planar/infer HTTP/1.1\r\nHost: a\r\n"
SMUGGLED = b"GET /v2/models/stats HTTP/1.1\r\nHost: a\r\n\r\n"


def conversation(server, data, until=b"nothing ends it but the service"):
    """The bytes received until the connection ends, or until they contain the text."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(data)
        received = b""
        while until not in received and (more := connection.recv(65536)):
            received += more
    return received


@pytest.mark.parametrize(
    ("label", "request_"),
    [
        ("two lengths", INFER + b"Content-Length: 4\r\nContent-Length: %d\r\n\r\n" % len(GOOD) + GOOD),
        (
            "length and chunks",
            INFER + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        ),
        ("chunked twice", INFER + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
        ("chunked in disguise", INFER + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
        ("unknown transfer", INFER + b"Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n" + SMUGGLED),
        ("negative length", INFER + b"Content-Length: -1\r\n\r\n" + SMUGGLED),
        ("length with plus", INFER + b"Content-Length: +5\r\n\r\n" + SMUGGLED),
        ("folded header", INFER + b"X: a\r\n Content-Length: 5\r\n\r\n" + SMUGGLED),
        ("bad chunk", INFER + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + SMUGGLED),
        ("huge chunk", INFER + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + SMUGGLED),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00" * 9),
    ],
)
def test_http_that_means_two_things(server, label, request_):
    received = conversation(server, request_)
    # At most one refusal: nothing after the ambiguous part is taken for a request.
    assert received.count(b"HTTP/1.1") <= 1
    assert b"model_stats" not in received
    assert not received or received.startswith(b"HTTP/1.1 400 "), label


def test_pipelined_requests_are_answered_in_turn(server, layers):
    x = np.arange(CHANNELS, dtype=np.float32)
    requests = b""
    for k in range(20):
        text = GOOD.replace(b"1.0", b"%d.0" % k).replace(b"{", b'{"id":"%d",' % k, 1)
        requests += INFER + b"Content-Length: %d\r\n\r\n" % len(text) + text
    received = conversation(server, requests, until=b'{"id":"19"')
    data = re.findall(rb'"data":(\[[^]]*\])', received)
    assert len(data) == 20
    for k, numbers in enumerate(data):
        expected = layers["planar"](np.full_like(x, k)[None])[0]
        assert np.array(json.loads(numbers), np.float32).tobytes() == expected.tobytes()


def test_clients_that_leave(server, layers):
    """Clients leave at every byte of a message, by an end or a reset; others still get their own answers."""
    head = INFER + b"Content-Length: %d\r\n\r\n" % len(GOOD)
    request = head + GOOD
    expected = server.infer("planar", GOOD).body
    for cut in range(len(request)):
        with socket.create_connection((server.host, server.port), timeout=20) as connection:
            connection.sendall(request[:cut])
            if cut % 2:  # a reset in place of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if cut % 16 == 0:
            assert server.infer("planar", GOOD).body == expected
    assert len(request) > 150
    assert server.infer("planar", GOOD).body == expected
    assert "Traceback" not in server.log
