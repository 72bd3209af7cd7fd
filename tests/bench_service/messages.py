"""The layers, the requests that are sent, and whether an answer is right."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

import batchnorm as bn
from bench_service.rows import EMPTY, OURS, Row

CHANNELS = (256, 4096)
TOLERANCE = 1e-5  # of the largest output: float32 in another order of operations stays well below
LOADING_SECONDS = 5  # a server may accept connections before its models are there
HEADER = "Inference-Header-Content-Length"


def model_name(channels: int) -> str:
    return f"bn{channels}"


def layers() -> dict[str, bn.FrozenBatchNorm]:
    """A layer with seeded parameters for each number of channels, by the name of its model."""
    made = {}
    for channels in CHANNELS:
        rng = np.random.default_rng(channels)
        mean, gamma, beta = rng.normal(size=(3, channels)).astype(np.float32)
        var = rng.gamma(2.0, size=channels).astype(np.float32)
        made[model_name(channels)] = bn.FrozenBatchNorm(mean, var, gamma, beta)
    return made


def save(directory: Path) -> tuple[Path, Path]:
    """Save the layers for us, and as scale and shift in float32 for the peers."""
    models, affine = directory / "models", directory / "affine.npz"
    models.mkdir()
    numbers = {}
    for name, layer in layers().items():
        layer.save(models / f"{name}.safetensors")
        mean, var, gamma, beta = (
            np.asarray(p, np.float64) for p in (layer.mean, layer.var, layer.gamma, layer.beta)
        )
        scale = gamma / np.sqrt(var + layer.eps)
        numbers[f"{name}.scale"] = scale.astype(np.float32)
        numbers[f"{name}.shift"] = (beta - mean * scale).astype(np.float32)
    np.savez(affine, **numbers)
    return models, affine


class Message(NamedTuple):
    """A request, and the answer that is right."""

    path: str
    headers: dict[str, str]
    body: bytes
    wanted: np.ndarray[Any, Any]


def message(row: Row, key: str) -> Message:
    """Return the request of a row; every server is sent the same bytes."""
    x = np.random.default_rng(0).normal(size=row.shape).astype(np.float32)
    name = model_name(row.shape[1])
    tensor: dict[str, Any] = {"name": "x", "shape": list(row.shape), "datatype": "FP32"}
    headers = {"Authorization": f"Bearer {key}"}
    if row.form == "binary":
        tensor["parameters"] = {"binary_data_size": x.nbytes}
        outputs = [{"name": "y", "parameters": {"binary_data": True}}]
        body = orjson.dumps({"inputs": [tensor], "outputs": outputs})
        headers |= {"Content-Type": "application/octet-stream", HEADER: str(len(body))}
        body += x.tobytes()
    else:
        tensor["data"] = x.ravel()
        body = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)
        headers |= {"Content-Type": "application/json"}
    return Message(f"/v2/models/{name}/infer", headers, body, layers()[name](x))


class Checked(NamedTuple):
    """What a first request showed: why the answer is wrong, if it is, and how long its body is."""

    wrong: str | None
    body_bytes: int


def check(port: int, name: str, row: Row, sent: Message) -> Checked:
    """Send a request once and look at the answer: ours has Python's bits, the empty one nothing."""
    deadline = time.monotonic() + LOADING_SECONDS
    while True:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("POST", sent.path, sent.body, sent.headers)
            answer = connection.getresponse()
            body = answer.read()
        if answer.status == 200 or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if answer.status != 200:
        return Checked(f"status {answer.status}: {body[:200].decode(errors='replace')}", len(body))
    if name == EMPTY:
        return Checked("it is not empty" if body else None, len(body))
    try:
        y = _output(body, answer.headers.get(HEADER), row)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return Checked(f"the answer cannot be read: {error!r}", len(body))
    if y.shape != sent.wanted.shape:
        return Checked(f"shape {y.shape}, not {sent.wanted.shape}", len(body))
    difference = float(np.max(np.abs(y - sent.wanted)) / np.max(np.abs(sent.wanted)))
    if name == OURS and y.tobytes() != sent.wanted.tobytes():
        return Checked(f"other bits than Python's, by {difference:.2g} of the largest output", len(body))
    if not difference <= TOLERANCE:
        return Checked(f"off by {difference:.2g} of the largest output", len(body))
    return Checked(None, len(body))


def _output(body: bytes, length: str | None, row: Row) -> np.ndarray[Any, Any]:
    cut = len(body) if length is None else int(length)
    (tensor,) = json.loads(body[:cut])["outputs"]
    if tensor["name"] != "y" or tensor["datatype"] != "FP32":
        raise ValueError(f"output {tensor['name']!r} of {tensor['datatype']}")
    if row.form == "binary":
        if tensor["parameters"]["binary_data_size"] != len(body) - cut:
            raise ValueError(f"{len(body) - cut} bytes follow the JSON")
        y = np.frombuffer(body, np.float32, offset=cut)
    else:
        y = np.array(tensor["data"], np.float32)
    return y.reshape(tensor["shape"])
