"""Framing of requests: ignored upgrades, long heads, errors between requests."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import time
from itertools import pairwise

import pytest

PATH = "/v2/models/planar/infer"
X = [[0.5, -1.0, 2.0, 0.0, 3.0]]
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 5], "datatype": "FP32", "data": X}]}).encode()
# What curl --http2 and Java's HttpClient send.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
# A body that would be answered by other bytes, were it ever taken for a request.
SMUGGLED = b"GET /v2/models/stats HTTP/1.1\r\nHost: a\r\n\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
ALIVE = 200, b'{"live":true}'
MAX_HEAD = 64 * 1024


def post(body: bytes, fields: bytes = b"", path: str = PATH) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n".encode()
    return head + fields + b"\r\n" + body


def chunked(body: bytes, fields: bytes = b"") -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n".encode()
    chunks = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in body)
    return head + fields + b"\r\n" + chunks + b"0\r\n\r\n"


def answers(server, pieces: list[bytes], wait: float = 0.05) -> list[tuple[int, bytes]]:
    """Send the pieces apart, and return all answers until the service closes the connection."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for k, piece in enumerate(pieces):
            if k:
                time.sleep(wait)
            connection.sendall(piece)
        found = []
        with connection.makefile("rb") as stream:
            while line := stream.readline():
                assert line.startswith(b"HTTP/1.1 "), line
                headers = http.client.parse_headers(stream)
                length = 0 if headers["X-Request-Id"] == "head" else int(headers["Content-Length"])
                found.append((int(line.split()[1]), stream.read(length)))
        return found


def answers_before_last(server, pieces: list[bytes]) -> list[tuple[int, bytes]]:
    """As `answers`, of requests that keep the connection; another request then ends it."""
    *found, last = answers(server, [*pieces[:-1], pieces[-1] + LAST])
    assert last == ALIVE
    return found


def cut(data: bytes, *places: int) -> list[bytes]:
    edges = [0, *places, len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@pytest.fixture(scope="module")
def expected(server):
    answer = server.request("POST", PATH, BODY)
    assert answer.status == 200
    return answer.status, answer.body


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("form", [post, chunked])
def test_an_upgrade_that_is_not_taken_is_ignored(server, expected, upgrade, form):
    request = form(BODY, upgrade)
    head = request.index(b"\r\n\r\n") + 4
    for places in ((), (head,), (head - 2,), (head + 9,), (20, head - 30, head + 1, head + 2)):
        assert answers_before_last(server, cut(request, *places)) == [expected], places


def test_an_upgrade_leaves_the_connection_as_it_is(server, expected):
    upgraded = [LIVE.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n") for fields in (H2C, WEBSOCKET)]
    pipeline = post(BODY, H2C) + LIVE + chunked(BODY, WEBSOCKET) + b"".join(upgraded)
    for data, wanted in (
        (pipeline, [expected, ALIVE, expected, ALIVE, ALIVE]),
        (pipeline * 20, [expected, ALIVE, expected, ALIVE, ALIVE] * 20),
        (post(BODY, b"Upgrade: h2c\r\n") + LIVE, [expected, ALIVE]),
    ):
        assert answers_before_last(server, [data]) == wanted
    closing = H2C.replace(b"Upgrade,", b"Upgrade, close,")
    assert answers(server, [post(BODY, closing)]) == [expected]
    assert answers(server, [post(BODY, closing) + LIVE]) == [expected]
    assert "Unsupported upgrade" not in server.log


@pytest.mark.parametrize("upgrade", [b"", H2C, WEBSOCKET], ids=["plain", "h2c", "websocket"])
@pytest.mark.parametrize("form", [post, chunked])
@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE", b"OPTIONS", b"HEAD"])
def test_a_body_is_never_a_request(server, upgrade, form, method):
    request = form(SMUGGLED, b"X-Request-Id: %s\r\n" % method.lower() + upgrade).replace(b"POST", method, 1)
    head = request.index(b"\r\n\r\n") + 4
    for places in ((), (head,), (head + 5,)):
        ((status, _),) = answers_before_last(server, cut(request, *places))
        assert status == (400 if method == b"POST" else 405), places


@pytest.mark.parametrize("target", [b"a:80", b"/v2/health/live", b"*"])
@pytest.mark.parametrize("fields", [b"", b"Content-Length: %d\r\n" % len(SMUGGLED)])
def test_connect_ends_the_connection(server, target, fields):
    head = b"CONNECT " + target + b" HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"
    for pieces in ([head + SMUGGLED], [head, SMUGGLED], [LIVE + head + SMUGGLED]):
        *before, (status, body) = answers(server, pieces)
        assert [one[0] for one in before] == [200] * pieces[0].startswith(LIVE)
        assert status in (400, 501)
        assert list(json.loads(body)) == ["error"]


def test_an_error_waits_for_the_answers_before_it(server, expected):
    """Otherwise a client would take it for the answer to another request, which would then have none."""
    garbage = b"\x16\x03\x01\x02\x00\x01\x00" * 9
    for end in (garbage, b"GET /v2 HTTP/7.7\r\n\r\n", chunked(BODY)[:200] + b"zz\r\n" + SMUGGLED):
        for pieces in ([post(BODY) * 3 + end], [post(BODY) * 3, end]):
            found = answers(server, pieces, wait=0)
            assert found[:-1] == [expected] * 3
            assert found[-1][0] == 400
            assert list(json.loads(found[-1][1])) == ["error"]


def long_head(size: int, fields: int) -> bytes:
    """A GET whose head has that size, in that many fields of about one length."""
    start = b"GET /v2/health/live HTTP/1.1\r\n"
    each = (size - len(start) - 2) // fields
    names = [b"A%05d: " % k for k in range(fields)]
    values = [b"b" * (each - len(name) - 2) for name in names]
    values[-1] += b"b" * ((size - len(start) - 2) - each * fields)
    head = (
        start + b"".join(name + value + b"\r\n" for name, value in zip(names, values, strict=True)) + b"\r\n"
    )
    assert len(head) == size
    return head


@pytest.mark.parametrize("fields", [1, 3, 2000])
@pytest.mark.parametrize(
    ("size", "status"),
    [
        (60_000, 200),
        (MAX_HEAD - 64, 200),
        (MAX_HEAD + 64, 431),
        (70_000, 431),
        (130_000, 431),
        (200_000, 431),
    ],
)
def test_the_limit_of_heads(server, size, status, fields):
    """The limit holds however heads arrive: after other requests, after a large body, in pieces."""
    head = long_head(size, fields)
    large = post(b" " * 150_000, path="/v2/models")
    for pieces, before in (
        ([head], []),
        (cut(head, 1), []),
        (cut(head, size // 2), []),
        ([LIVE + head], [200]),
        ([large + head], [405]),
        (cut(large + head, len(large) + size // 2), [405]),
    ):
        found = [one[0] for one in (answers_before_last if status == 200 else answers)(server, pieces)]
        assert found == [*before, status], (len(pieces), before)


def test_trailers_are_no_headers(server, expected):
    """Trailers change nothing, even in the packet of the head, and have the same limit of size as headers."""
    trailers = b"Inference-Header-Content-Length: 3\r\nContent-Encoding: br\r\nX-Request-Id: head\r\n"
    body = chunked(BODY).removesuffix(b"\r\n")
    head = body.index(b"\r\n\r\n") + 4
    for places in ((), (head,), (len(body),), (len(body) + 10,)):
        assert answers_before_last(server, cut(body + trailers + b"\r\n", *places)) == [expected]
    for data in (b"A: " + b"b" * 300_000, b"A: bcdefgh\r\n" * 30_000):
        found = answers(server, [body + data[:100_000], data[100_000:200_000], data[200_000:]])
        assert [status for status, _ in found] in ([431], [200, 431])


def test_a_body_in_small_chunks_has_no_limit_of_heads(server):
    large = json.loads(BODY) | {"unknown": "a" * 100_000}
    data = json.dumps(large).encode()
    answer = answers_before_last(server, cut(chunked(data), 200_000, 200_001, 400_002))
    assert [status for status, _ in answer] == [200]


def test_the_limit_of_a_request_line(server):
    found = answers(server, [b"GET /" + b"a" * MAX_HEAD + b" HTTP/1.1\r\nHost: a\r\n\r\n"])
    assert [status for status, _ in found] == [431]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_that_offers_http2(server, expected):
    url = f"http://{server.address}{PATH}"
    command = ["curl", "-sS", "--http2", "--max-time", "20", url, "-d", "@-"]
    result = subprocess.run(command, input=BODY, capture_output=True, check=True)
    assert result.stdout == expected[1]
