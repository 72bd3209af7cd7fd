"""Starts the real service as a separate process, and sends it requests as a client without our code would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_START_SECONDS = 60
_JSON_LENGTH = "Inference-Header-Content-Length"


class Answer(NamedTuple):
    """The service's answer: y, float32, and the fingerprint of the layer that computed it."""

    y: NDArray[np.float32]
    fingerprint: str | None


@contextmanager
def serving(models: Path, log: Path) -> Iterator[int]:
    """Serve a directory on a free port of the loopback address; yield the port once the service is ready.

    Args:
        models: The directory of models.
        log: The file that the process writes its log to.

    Raises:
        RuntimeError: The process ended, or was not ready in time; the message has the end of its log.
    """
    command = [sys.executable, "-m", "batchnorm_service", str(models), "--port", "0", "--drain-seconds", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield _port(process, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text("utf-8", "replace")):
            port = int(found[1])
            status, _, _ = _ask(port, "GET", "/v2/health/ready")
            if status == 200:
                return port
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start: {log.read_text('utf-8', 'replace')[-2000:]}")


def infer_json(port: int, model: str, x: NDArray[np.float32]) -> Answer:
    """Send x as JSON numbers and read y from JSON numbers."""
    data = x.ravel().tolist()
    body = {"inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "data": data}]}
    headers, answer = _post(port, model, json.dumps(body).encode(), {"Content-Type": "application/json"})
    (y,) = json.loads(answer)["outputs"]
    values = np.array(y["data"], np.float32).reshape(y["shape"])
    return Answer(values, headers.get("batchnorm-fingerprint"))


def infer_binary(port: int, model: str, x: NDArray[np.float32]) -> Answer:
    """Send the bytes of x after the JSON and read the bytes of y after the JSON (binary tensor extension)."""
    little = np.dtype("<f4")
    size = {"binary_data_size": x.nbytes}
    head = json.dumps(
        {
            "inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": size}],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        }
    ).encode()
    body = head + x.astype(little).tobytes()
    headers, answer = _post(port, model, body, {_JSON_LENGTH: str(len(head))})
    length = int(headers[_JSON_LENGTH.lower()])
    (y,) = json.loads(answer[:length])["outputs"]
    values = np.frombuffer(answer[length:], little).astype(np.float32).reshape(y["shape"])
    return Answer(values, headers.get("batchnorm-fingerprint"))


def _post(port: int, model: str, body: bytes, headers: dict[str, str]) -> tuple[dict[str, str], bytes]:
    status, answered, answer = _ask(port, "POST", f"/v2/models/{model}/infer", body, headers)
    if status != 200:
        raise RuntimeError(f"the service answered {status}: {answer[:500]!r}")
    return answered, answer


def _ask(port: int, *request: Any) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(*request)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()
    finally:
        connection.close()
