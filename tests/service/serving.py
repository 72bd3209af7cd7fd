"""A service process of its own for tests, and plain HTTP to it without any client library's help."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

import batchnorm as bn

CHANNELS = 5
START_SECONDS = 30
STOP_SECONDS = 15


def make_layer(seed: int, **options) -> bn.FrozenBatchNorm:
    rng = np.random.default_rng(seed)
    mean, gamma, beta = rng.normal(size=(3, CHANNELS))
    return bn.FrozenBatchNorm(mean, rng.gamma(2.0, size=CHANNELS), gamma, beta, **options)


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        return json.loads(self.body)


class Server:
    """Address and log of a running service."""

    def __init__(self, process: subprocess.Popen, log: Path, context: ssl.SSLContext | None = None):
        self.process = process
        self.context = context
        self._log = log
        self.host, self.port = self._address()

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def request(self, method: str, path: str, body=None, headers=None) -> Answer:
        """One request on a connection of its own; no header is added but Host and Content-Length."""
        with closing(self.connect()) as connection:
            connection.putrequest(method, path, skip_accept_encoding=True)
            headers = dict(headers or {})
            if body is not None:
                headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def connect(self) -> http.client.HTTPConnection:
        """A connection, of which more than one request may be made."""
        if self.context:
            return http.client.HTTPSConnection(self.host, self.port, timeout=20, context=self.context)
        return http.client.HTTPConnection(self.host, self.port, timeout=20)

    def raw(self, data: bytes) -> Answer:
        """Send bytes that are taken for a request as they are."""
        with closing(socket.create_connection((self.host, self.port), timeout=20)) as connection:
            connection.sendall(data)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return Answer(response.status, response.headers, response.read())

    def infer(self, model: str, message, tail: bytes = b"", headers=None) -> Answer:
        """Send an inference request; `tail` follows the JSON as binary data, with its header."""
        text = message if isinstance(message, bytes) else json.dumps(message).encode()
        lengths = {"Inference-Header-Content-Length": str(len(text))} if tail else {}
        return self.request("POST", f"/v2/models/{model}/infer", text + tail, lengths | (headers or {}))

    def _address(self) -> tuple[str, int]:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if found := re.search(r"https?://([\d.]+):(\d+)", self.log):
                return found[1], int(found[2])
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no address after {START_SECONDS} s or exit; log:\n{self.log}")

    def wait_for_log(self, text: str, count: int = 1) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.log.count(text) < count:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def wait_until_live(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                assert self.request("GET", "/v2/health/live").status == 200
            except OSError:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)
            else:
                return


@contextmanager
def serve(
    log: Path, *arguments: str, command=("-m", "batchnorm_service"), environment=None, context=None, **options
):
    """Run a service on a free loopback port until the block ends; it must then stop by itself on SIGTERM.

    `context` is for TLS, `options` are those of Popen.
    """
    port = () if "--port" in arguments or command != ("-m", "batchnorm_service") else ("--port", "0")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command, *arguments, *port],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={"BATCHNORM_SERVICE_DRAIN_SECONDS": "0", **os.environ, **(environment or {})},
            start_new_session=True,
            **options,
        )
    try:
        server = Server(process, log, context)
        server.wait_until_live()
        yield server
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            status = process.wait(STOP_SECONDS)
            assert status == 0 or command != ("-m", "batchnorm_service"), server.log
    finally:
        if process.poll() is None:
            process.kill()  # its workers then end by themselves
            process.wait()
