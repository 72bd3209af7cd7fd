"""The process: command line, settings, body limit, workers, misbehaving clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from serving import CHANNELS, STOP_SECONDS, serve
from tritonclient.utils import InferenceServerException

import batchnorm as bn
from batchnorm_service.http.app import create_app
from batchnorm_service.http.infer import INLINE_BYTES
from batchnorm_service.settings import Settings

INFER = "/v2/models/planar/infer"


def message(rows, **members):
    x = np.ones((rows, CHANNELS), np.float32)
    size = {"binary_data_size": x.nbytes}
    head = {
        "inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": size}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head | members).encode()
    return x, text + x.tobytes(), {"Inference-Header-Content-Length": str(len(text))}


def command(*arguments, **environment):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_SERVICE_")
    }
    return subprocess.run(
        [sys.executable, "-m", "batchnorm_service", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=inherited | environment,
    )


# Settings and command line


def test_settings(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("BATCHNORM_SERVICE_"):
            monkeypatch.delenv(name)
    plain = Settings(models=tmp_path)
    assert (plain.models, plain.host, plain.port, plain.workers) == (tmp_path, "127.0.0.1", 8080, 1)
    assert (plain.max_body, plain.nan, plain.control, plain.keys) == (64 * 2**20, "tokens", False, None)
    for wrong, reason in (
        ({"models": None}, "DIR or --model-dir"),
        ({"model_dir": tmp_path, "model_name": "a"}, "either DIR or --model-dir"),
        ({"models": None, "model_dir": tmp_path}, "--model-name go together"),
        ({"model_name": "a"}, "--model-name go together"),
        ({"models": None, "model_dir": tmp_path, "model_name": "a/b"}, "--model-name must match"),
        ({"models": None, "model_dir": tmp_path, "model_name": "stats"}, "none of stats"),
        ({"max_queued": 1000}, "--max-queued must be at least --max-body"),
        ({"host": "0.0.0.0"}, "--allow-anonymous"),
        ({"drain_seconds": -1}, "drain_seconds"),
    ):
        with pytest.raises(ValueError, match=reason):
            Settings(**{"models": tmp_path} | wrong)
    for host in ("localhost", "::1", "127.3.2.1"):
        assert Settings(models=tmp_path, host=host).host == host
    monkeypatch.setenv("BATCHNORM_SERVICE_MODELS", str(tmp_path))
    monkeypatch.setenv("BATCHNORM_SERVICE_MAX_BODY", "1MiB")
    monkeypatch.setenv("BATCHNORM_SERVICE_PORT", "9")
    monkeypatch.setenv("BATCHNORM_SERVICE_CONTROL", "true")
    given = {"max_body": 2**20, "port": 10, "control": True}
    assert Settings(port=10).model_dump() == plain.model_dump() | given


def test_help_names_every_setting():
    result = command("--help")
    assert result.returncode == 0
    assert "DIR" in result.stdout
    for name in set(Settings.model_fields) - {"models"}:
        assert f"--{name.replace('_', '-')}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "DIR"),
        (("/nowhere/at/all",), "DIR"),
        ((__file__,), "DIR"),
        ((".", "--port", "70000"), "port"),
        ((".", "--port", "http"), "port"),
        ((".", "--workers", "0"), "workers"),
        ((".", "--max-body", "0"), "max_body"),
        ((".", "--max-body", "lots"), "max_body"),
        ((".", "--unknown"), "--unknown"),
    ],
)
def test_misuse(arguments, reason):
    result = command(*arguments)
    assert result.returncode == 2
    assert reason in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_taken_port(server, models):
    result = command(str(models), "--port", str(server.port))
    assert result.returncode not in (0, 2)
    assert "address already in use" in result.stderr.lower()
    assert "Traceback" not in result.stderr


def test_only_loopback_is_bound(server):
    assert server.host == "127.0.0.1"
    with pytest.raises(OSError, match=r"refused|unreachable"):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_the_log_says_what_is_served_and_what_is_not(server, layers):
    for name in ("broken", "link"):
        assert f"model '{name}' version '1' is not loaded" in server.log
    assert "a symbolic link leaves the directory" in server.log
    assert layers["planar"].fingerprint in server.log


def test_the_environment_is_read(tmp_path, models):
    environment = {"BATCHNORM_SERVICE_MODELS": str(models), "BATCHNORM_SERVICE_MAX_BODY": "1000"}
    with serve(tmp_path / "log", environment=environment) as server:
        assert server.request("GET", "/v2/health/ready").status == 200
        answer = server.request("POST", INFER, b" " * 1001)
        assert (answer.status, "1000" in answer.json()["error"]) == (413, True)


def test_two_workers(tmp_path, models, layers):
    x, body, headers = message(3)
    expected = layers["planar"](x).tobytes()
    with serve(tmp_path / "log", str(models), "--workers", "2") as server:
        server.wait_for_log("Application startup complete", 2)
        for _ in range(50):
            assert server.request("POST", INFER, body, headers).body.endswith(expected)
        if sys.platform == "linux":  # where one can look: the workers share the threads
            pid = server.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            threads = os.environ.get("BATCHNORM_NUM_THREADS", str(max(1, bn.get_num_threads() // 2)))
            assert len(children) >= 2
            for child in children:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                assert f"BATCHNORM_NUM_THREADS={threads}".encode() in environment
    # The sockets of the workers are gone with them.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port), timeout=5)


def test_sigint_ends_it_without_a_traceback(tmp_path, models):
    with serve(tmp_path / "log", str(models)) as server:
        server.process.send_signal(signal.SIGINT)
        server.process.wait(STOP_SECONDS)
        assert "Traceback" not in server.log


# The body limit


@pytest.fixture(scope="module")
def small(models, tmp_path_factory):
    """A service with a limit of 100,000 bytes."""
    with serve(tmp_path_factory.mktemp("small") / "log", str(models), "--max-body", "100000") as running:
        yield running
    assert "Traceback" not in running.log


def test_the_limit_is_exact(small):
    _, body, headers = message(100)
    for size, status in ((100_000, 200), (100_001, 413)):
        blanks = size - len(body)
        length = int(headers["Inference-Header-Content-Length"])
        padded = body[:length] + b" " * blanks + body[length:]
        answer = small.request(
            "POST", INFER, padded, {"Inference-Header-Content-Length": str(length + blanks)}
        )
        assert len(padded) == size
        assert answer.status == status


def test_the_length_is_refused_before_the_body(small):
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {10**15}\r\nExpect: 100-continue\r\n\r\n"
    answer = small.raw(head.encode())
    assert answer.status == 413
    assert list(answer.json()) == ["error"]


def test_a_chunked_body_is_refused_when_it_passes_the_limit(small):
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    answer = small.raw(head.encode() + chunk * 4)  # and no end
    assert answer.status == 413
    assert list(answer.json()) == ["error"]


def test_a_client_that_sends_too_much_still_reads_the_answer(small, layers):
    x = np.ones((200_000, CHANNELS), np.float32)
    with triton.InferenceServerClient(small.address) as client:
        for part, accepted in ((x, False), (x[:10], True)):
            given = triton.InferInput("x", list(part.shape), "FP32").set_data_from_numpy(part)
            if accepted:
                y = client.infer("planar", [given]).as_numpy("y")
                assert y.tobytes() == layers["planar"](part).tobytes()
            else:
                with pytest.raises(InferenceServerException, match="100000") as refusal:
                    client.infer("planar", [given])
                assert refusal.value.status() == "413"


# Clients that misbehave, and parts that are missing


def test_a_client_that_leaves_in_the_middle(server, layers):
    x, body, headers = message(1000)
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (0, 10, len(body) - 1):
        with socket.create_connection((server.host, server.port), timeout=5) as connection:
            connection.sendall(head + body[:sent])
    answer = server.request("POST", INFER, body, headers)
    assert answer.body.endswith(layers["planar"](x).tobytes())
    assert "Traceback" not in server.log


def test_a_slow_client_keeps_nobody_waiting(server, layers):
    x, body, headers = message(1000)
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    with socket.create_connection((server.host, server.port), timeout=20) as slow:
        slow.sendall(head.encode() + body[:-1])
        assert server.request("POST", INFER, body, headers).status == 200
        slow.sendall(body[-1:])
        response = http.client.HTTPResponse(slow)
        response.begin()
        assert response.read().endswith(layers["planar"](x).tobytes())


def test_requests_share_a_connection_with_refusals(server, layers):
    x, body, headers = message(3)
    connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
    for _ in range(3):
        connection.request("POST", INFER, body[:-1], headers)
        refused = connection.getresponse()
        assert (refused.status, list(json.load(refused))) == (400, ["error"])
        connection.request("POST", INFER, body, headers)
        assert connection.getresponse().read().endswith(layers["planar"](x).tobytes())
    connection.close()


def test_without_ml_dtypes(tmp_path, models, layers):
    """BF16 is answered with an error that gives the reason; the rest works."""
    script = tmp_path / "bare.py"
    script.write_text(
        "import sys\nsys.modules['ml_dtypes'] = None\nfrom batchnorm_service.__main__ import main\nmain()\n"
    )
    x, body, headers = message(3)
    head = {
        "name": "x",
        "shape": x.shape,
        "datatype": "BF16",
        "parameters": {"binary_data_size": x.nbytes // 2},
    }
    request = {"inputs": [head], "parameters": {"binary_data_output": True}}
    with serve(tmp_path / "log", str(models), "--port", "0", command=(str(script),)) as server:
        answer = server.infer("planar", request, bytes(x.nbytes // 2))
        assert (answer.status, "ml_dtypes" in answer.json()["error"]) == (501, True)
        assert server.request("POST", INFER, body, headers).body.endswith(layers["planar"](x).tobytes())


def test_large_messages_are_answered_in_a_thread(models, layers):
    app = create_app(Settings(models=models))

    async def call(body, headers):
        """One request to the application, without a server."""
        sent = []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event):
            sent.append(event)

        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": INFER, "headers": pairs, "query_string": b""}
        await app(scope, receive, send)
        return sent[0]["status"], b"".join(event.get("body", b"") for event in sent)

    def workers():
        return [thread for thread in threading.enumerate() if thread.name == "AnyIO worker thread"]

    async def run():
        for rows, threads in ((10, 0), (INLINE_BYTES // (4 * CHANNELS) + 1, 1)):
            x, body, headers = message(rows)
            status, answer = await call(body, headers)
            assert status == 200
            assert answer.endswith(layers["planar"](x).tobytes())
            assert len(workers()) == threads

    asyncio.run(run())
