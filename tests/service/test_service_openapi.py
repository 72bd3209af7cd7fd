"""The OpenAPI document: it has exactly the routes, its examples are real, and a fuzzer finds no violation."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from base64 import b64decode
from contextlib import closing
from pathlib import Path

import pytest
from serving import serve
from starlette.routing import Route

import batchnorm as bn
from batchnorm_service.http.app import create_app
from batchnorm_service.settings import Settings

# Routes that the document leaves out: those of the document itself, and another spelling of a path.
UNDESCRIBED = {("get", "/openapi.json"), ("get", "/docs"), ("get", "/v2/")}


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    """A service with the model of docs/service.md, which nobody has asked for anything yet."""
    root = tmp_path_factory.mktemp("scale")
    (root / "models").mkdir()
    layer = bn.FrozenBatchNorm(mean=[0.5, -1.0, 2.0], var=[1.0, 4.0, 0.25])
    layer.save(root / "models" / "scale.safetensors")
    with serve(root / "log", str(root / "models"), "--control") as server:
        yield server
    assert "Traceback" not in server.log


def operations(document):
    return {(verb, path) for path, item in document["paths"].items() for verb in item}


def test_routes_and_operations_are_the_same(models):
    app = create_app(Settings(models=models))
    routes = {
        (verb.lower(), route.path)
        for route in app.routes
        if isinstance(route, Route) and "{repository}" not in route.path  # all of which are refused
        for verb in route.methods - {"HEAD"}
    }
    described = operations(app.openapi())
    assert len(described) >= 15
    assert described == routes - UNDESCRIBED
    assert routes >= UNDESCRIBED


def as_sent(example):
    """Body and headers of an example."""
    if "x-base64" in example:
        return b64decode(example["x-base64"]), example["x-headers"]
    return json.dumps(example["value"]).encode(), {}


def test_every_example_is_real(scale):
    document = scale.request("GET", "/openapi.json").json()
    asked = 0
    # Statistics are documented as they are before any inference.
    for verb, path in sorted(operations(document)):
        operation = document["paths"][path][verb]
        for parameter in operation["parameters"]:
            if parameter["in"] == "path":
                path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
        content = operation["responses"]["200"]["content"]
        if path == "/metrics":  # whose example is one line of many
            assert content["text/plain"]["example"] in scale.request("GET", path).body.decode()
            continue
        if verb == "get":
            answer = scale.request("GET", path)
            assert answer.status == 200
            assert answer.json() == content["application/json"]["example"], path
            asked += 1
            continue
        for kind, body in operation["requestBody"]["content"].items():
            for name, example in body["examples"].items():
                sent, headers = as_sent(example)
                answer = scale.request("POST", path, sent, headers | {"Content-Type": kind})
                assert answer.status == 200, answer.body
                asked += 1
                if not content:
                    assert answer.body == b""
                    continue
                assert answer.headers["Content-Type"] == kind
                expected, headers = as_sent(content[kind]["examples"][name])
                if kind == "application/json":
                    assert answer.json() == json.loads(expected)
                else:
                    assert answer.body == expected
                assert all(answer.headers[key] == value for key, value in headers.items())
    assert asked == 15 - 2 + 2 * 2 + 3
    assert scale.request("POST", "/v2/repository/models/scale/load", b"").status == 200


def test_head_is_get_without_the_body(scale):
    document = scale.request("GET", "/openapi.json").json()
    paths = [path for verb, path in operations(document) if verb == "get"]
    for path in [
        *paths,
        "/docs",
        "/openapi.json",
        "/v2/",
        "/nowhere",
        "/v2/models/nothing",
        "/v2/models/scale/infer",
    ]:
        path = path.format(name="scale", version="1")
        with closing(socket.create_connection((scale.host, scale.port), timeout=20)) as connection:
            connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            received = b""
            while more := connection.recv(65536):
                received += more
        head, body = received.split(b"\r\n\r\n")
        assert body == b""
        got = scale.request("GET", path)
        assert int(head.split()[1]) == got.status, path
        same = ("content-type",) if path == "/metrics" else ("content-type", "content-length")  # it counts
        assert all(f"{name}: {got.headers[name]}".encode() in head.lower() for name in same), (path, head)
    assert len(paths) >= 12
    wrong = scale.request("DELETE", "/v2")
    assert (wrong.status, wrong.headers["Allow"]) == (405, "GET, HEAD")


def test_the_page_shows_it(scale):
    assert "/openapi.json" in scale.request("GET", "/docs").body.decode()


@pytest.mark.long
def test_a_fuzzer_finds_the_document_kept(scale, tmp_path):
    """schemathesis: whatever is sent, every answer is one that the document describes."""
    report = tmp_path / "report.txt"
    with report.open("w") as stream:
        result = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                *("run", f"http://{scale.address}/openapi.json"),
                *("--exclude-path-regex", "/v2/repository/models"),  # which would end it all
                *("--max-examples", "100", "--seed", "1", "--no-color"),
                # No schema says how many numbers a shape wants.
                *("--exclude-checks", "positive_data_acceptance"),
            ],
            stdout=stream,
            stderr=stream,
            cwd=tmp_path,
            timeout=240,
        )
    print(report.read_text()[-2000:])
    assert result.returncode == 0, report.read_text()
