"""Limits of what one client may take: requests, bytes, connections and time."""

from __future__ import annotations

import http.client
import json
import socket
import time
from contextlib import ExitStack, contextmanager

import pytest
from serving import serve
from test_service_process import INFER, message

SECONDS = 0.4


@pytest.fixture(scope="module")
def narrow(models, tmp_path_factory):
    """A service that admits 2 requests of 50,000 bytes together, 6 connections, and no delay."""
    arguments = [
        f"--max-{name}={value}"
        for name, value in (("body", 40_000), ("queued", 50_000), ("requests", 2), ("connections", 6))
    ]
    log = tmp_path_factory.mktemp("narrow") / "log"
    with serve(
        log, str(models), *arguments, f"--header-seconds={SECONDS}", f"--body-seconds={SECONDS}"
    ) as server:
        yield server
    assert "Traceback" not in server.log


@contextmanager
def sent(server, data: bytes):
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(data)
        yield connection


def head(length: int) -> bytes:
    return f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode()


def answer_on(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.headers, json.loads(response.read())


def in_flight(server) -> dict[str, float]:
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(values[f"batchnorm_{name}_in_flight"]) for name in ("requests", "request_bytes")}


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("lengths", "asked"),
    [((10, 10), 10), ((30_000,), 20_001), ((30_000, 20_000), 10)],
    ids=["requests", "bytes", "both"],
)
def test_what_is_in_flight_is_bounded(narrow, lengths, asked):
    _, body, headers = message(3)
    with ExitStack() as stack:
        for length in lengths:
            stack.enter_context(sent(narrow, head(length)))
        expected = {"requests": len(lengths), "request_bytes": sum(lengths)}
        wait_until(lambda: in_flight(narrow) == expected)
        with sent(narrow, head(asked)) as refused:
            status, answered, error = answer_on(refused)
            assert (status, answered["Retry-After"], list(error)) == (503, "1", ["error"])
    wait_until(lambda: not any(in_flight(narrow).values()))  # they left, and count no more
    assert narrow.request("POST", INFER, body, headers).status == 200


def test_a_body_that_announces_no_length_counts_as_the_largest(narrow):
    chunked = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with sent(narrow, chunked):
        wait_until(lambda: in_flight(narrow)["request_bytes"] == 40_000)
    with sent(narrow, head(10**12)) as large:
        assert answer_on(large)[0] == 413  # and not 503
    wait_until(lambda: not any(in_flight(narrow).values()))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "headers"),
        (b"GET /v2/health/live HTTP/1.1\r\n", "headers"),
        (b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\nGET /v2/hea", "headers"),
        (head(100), "body"),
        (head(100) + b"{", "body"),
        (f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n".encode(), "body"),
    ],
    ids=["nothing", "headers", "second", "no body", "body", "chunk"],
)
def test_a_client_that_stalls_is_told_so(narrow, data, what):
    began = time.monotonic()
    with sent(narrow, data) as connection:
        status, headers, error = answer_on(connection)
        if status == 200:
            status, headers, error = answer_on(connection)
        assert (status, headers["Connection"]) == (408, "close")
        assert error == {"error": f"the {what} took longer than {SECONDS:g} s"}
        assert connection.recv(1) == b""
    assert time.monotonic() - began >= SECONDS
    wait_until(lambda: not any(in_flight(narrow).values()))


def test_a_client_that_drips_is_no_better(narrow):
    with sent(narrow, b"GET /v2/health/live HTTP/1.1\r\nX: ") as connection:
        connection.settimeout(0.05)
        received = b""
        for _ in range(200):
            try:
                connection.sendall(b"x")
                received = connection.recv(1000)
                break
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_kept(narrow):
    connection = narrow.connect()
    for _ in range(3):
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().read() == b'{"live":true}'
        time.sleep(1.5 * SECONDS)
    connection.close()


def test_headers_without_end(narrow):
    for data in (
        b"GET /" + b"a" * 70_000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 12_000,
        b"GET / HTTP/1.1\r\nA: " + b"b" * 70_000,
    ):
        with sent(narrow, data) as connection:
            status, _, error = answer_on(connection)
            assert (status, list(error)) == (431, ["error"])


def test_connections_are_bounded(narrow):
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(sent(narrow, b""))
        data = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
        sixth = stack.enter_context(sent(narrow, data))
        assert answer_on(sixth)[0] == 200
        with sent(narrow, data) as refused:
            status, headers, error = answer_on(refused)
            assert (status, headers["Retry-After"], list(error)) == (503, "1", ["error"])
    wait_until(lambda: narrow.request("GET", "/v2/health/live").status == 200)
