"""Models are loaded and unloaded while the service runs, in one process or several, whatever the files."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.http as triton
from serving import CHANNELS, STOP_SECONDS, make_layer, serve
from test_service_models import open_repository, put
from test_service_process import command
from tritonclient.utils import InferenceServerException

import batchnorm as bn
from batchnorm.onnx import load_frozen
from batchnorm_service.errors import LoadError, ModelNotFoundError, NotReadyError
from batchnorm_service.models.directory import Directory
from batchnorm_service.models.repository import Repository
from batchnorm_service.models.shared_state import SharedState

X = np.arange(3 * CHANNELS, dtype=np.float32).reshape(3, CHANNELS)
OLD, NEW = make_layer(1), make_layer(2)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A process with the control API, and its directory of models, whose state each test leaves behind."""
    root = tmp_path_factory.mktemp("control")
    put(root, "first.safetensors", OLD)
    with serve(root.parent / "control-log", str(root), "--control") as server:
        yield server, root
    assert "Traceback" not in server.log


def post(server, path, body=None, headers=None):
    return server.request(
        "POST", f"/v2/repository/{path}", b"" if body is None else json.dumps(body).encode(), headers
    )


def index(server):
    return {(entry["name"], entry.get("version")): entry for entry in post(server, "index").json()}


def served(server, model):
    """Fingerprint and bytes of one answer."""
    head = {
        "inputs": [
            {"name": "x", "shape": X.shape, "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}}
        ]
    }
    answer = server.infer(model, head | {"parameters": {"binary_data_output": True}}, X.tobytes())
    if answer.status != 200:
        return answer.status, answer.json()["error"]
    return answer.headers["Batchnorm-Fingerprint"], answer.body[-X.nbytes :]


def answers_of(layer):
    return layer.fingerprint, layer(X).tobytes()


# The repository itself


def test_a_load_takes_the_directory_as_it_is(root):
    put(root, "a/1/bn.safetensors", OLD)
    put(root, "b.safetensors", OLD)
    repository = open_repository(root)
    held = repository.get("a")
    shutil.rmtree(root / "a" / "1")
    put(root, "a/2/bn.safetensors", NEW)
    put(root, "b.safetensors", NEW)
    assert repository.get("a") is held
    assert repository.load("a") == repository.generation + 1
    assert repository.stale
    repository.refresh()
    assert (repository.versions("a"), repository.get("a").layer) == (["2"], NEW)
    assert repository.get("b").layer == OLD  # was not asked for
    assert held.layer == OLD
    assert not repository.stale


def test_a_load_of_the_same_file_changes_nothing(root):
    put(root, "a.safetensors", OLD)
    repository = open_repository(root)
    held = repository.get("a")
    repository.load("a")
    repository.refresh()
    assert repository.get("a") is held


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x00"), "damaged"),
        (lambda path: path.unlink(), "one of bn.safetensors, bn.onnx, model.onnx is wanted, found none"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "a symbolic link leaves"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "symbolic links in a circle"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file"),
        (lambda path: path.with_name("model.onnx").write_bytes(b"x"), "found bn.safetensors, model.onnx"),
    ],
    ids=["cut", "empty", "altered", "missing", "folder", "pipe", "outside", "circle", "dangling", "two"],
)  # fmt: skip
def test_a_load_that_fails_keeps_what_is_served(root, harm, reason):
    put(root, "a/1/bn.safetensors", OLD)
    path = put(root, "a/2/bn.safetensors", OLD)
    repository = open_repository(root)
    put(root, "a/1/bn.safetensors", NEW)
    put(root, "a/3/bn.safetensors", NEW)
    harm(path)
    with pytest.raises(LoadError, match=reason) as refusal:
        repository.load("a")
    assert str(root) not in str(refusal.value)
    repository.refresh()
    assert repository.versions("a") == ["1", "2"]
    assert repository.get("a", "1").layer == repository.get("a", "2").layer == OLD
    entries = {entry.version: entry for entry in repository.index()}
    assert entries["1"].reason == ""
    assert (entries["2"].fingerprint, reason in entries["2"].reason) == (OLD.fingerprint, True)
    assert (entries["3"].fingerprint, entries["3"].reason) == (None, "not loaded yet")
    for leftover in (root / "a" / "2").iterdir():
        leftover.rmdir() if leftover.is_dir() else leftover.unlink()
    put(root, "a/2/bn.safetensors", NEW)
    repository.load("a")
    repository.refresh()
    assert repository.get("a", "2").layer == NEW
    assert all(entry.reason == "" for entry in repository.index())


def test_a_name_never_becomes_a_path(root):
    put(root.parent, "outside.safetensors")
    put(root, "a.safetensors")
    repository = open_repository(root)
    for name in (
        "../outside",
        "..",
        ".",
        "",
        "/",
        "a/../a",
        str(root / "a"),
        "a\0",
        "n" * 5000,
        "stats",
        "a.safetensors",
    ):
        for change in (repository.load, repository.unload):
            with pytest.raises(ModelNotFoundError):
                change(name)
    assert repository.names() == ["a"]


def test_unloaded_until_it_is_loaded(root):
    put(root, "a.safetensors")
    repository = open_repository(root)
    for _ in range(2):
        repository.unload("a")
        repository.refresh()
        assert not repository.ready
        with pytest.raises(NotReadyError, match="unloaded"):
            repository.get("a")
    assert [(entry.fingerprint, entry.reason) for entry in repository.index()] == [(None, "unloaded")]
    repository.load("a")
    repository.refresh()
    assert repository.ready


@pytest.mark.parametrize("files", [("bn.safetensors",), ("1/bn.safetensors",), ("2/model.onnx", "bn.onnx")])
def test_a_directory_that_is_one_model(root, files):
    for file in files:
        path = root / file
        path.parent.mkdir(exist_ok=True)
        OLD.save(path) if path.suffix == ".safetensors" else onnx.save(OLD.to_onnx(), path)
    (root / "README.md").write_text("of no interest")
    repository = open_repository(root, "mine")
    assert repository.names() == ["mine"]
    assert repository.get("mine").layer == OLD
    assert repository.versions("mine") == ["1", "2"][: len(files)]
    with pytest.raises(ModelNotFoundError):
        repository.load("bn")
    repository.load("mine")


def test_onnx_models(root, caplog):
    onnx.save(OLD.to_onnx(), root / "ours.onnx")
    onnx.save(OLD.to_onnx(mode="exact"), root / "exact.onnx")
    data = Path(__file__).parents[1] / "data" / "onnx"
    shutil.copy(data / "bn_first.dynamo.opset20.onnx", root / "foreign.onnx")
    (root / "torn.onnx").write_bytes(b"\x08\xff")
    external = onnx.ModelProto.FromString(OLD.to_onnx().SerializeToString())
    onnx.external_data_helper.convert_model_to_external_data(external, location="weights", size_threshold=0)
    onnx.save(external, root / "external.onnx")
    assert (root / "weights").exists()
    two = onnx.ModelProto.FromString(OLD.to_onnx().SerializeToString())
    two.graph.node.add().CopyFrom(two.graph.node[0])
    two.graph.node[1].output[0] = "z"
    (root / "two.onnx").write_bytes(two.SerializeToString())
    repository = open_repository(root)
    assert repository.get("ours").layer == repository.get("exact").layer == OLD
    assert repository.get("foreign").layer == load_frozen(root / "foreign.onnx")
    reasons = {entry.name: entry.reason for entry in repository.index() if not entry.fingerprint}
    assert "other files" in reasons["external"]
    assert "one BatchNormalization is wanted, found 2" in reasons["two"]
    assert reasons["torn"]


def test_a_file_that_changes_while_it_is_served_does_no_harm(root):
    """A loaded model is a copy: the file may be cut, and a later process still serves it."""
    path = put(root, "a.safetensors", OLD)
    shared = root.parent / "state"
    shared.mkdir()
    first = Repository(Directory(root), SharedState(shared))
    first.load_all()
    path.write_bytes(b"")
    later = Repository(Directory(root), SharedState(shared))
    later.refresh()
    assert later.get("a").layer == OLD


def test_shared_layers_are_those_of_the_list(root):
    """A layer stays as long as the list names it, and is served only if it is the one that the list means."""
    put(root, "a.safetensors", OLD)
    repository = open_repository(root)
    layers = root.parent / "shared" / "layers"
    assert [path.name for path in layers.iterdir()] == [OLD.fingerprint]
    put(root, "a.safetensors", NEW)
    repository.load("a")
    assert [path.name for path in layers.iterdir()] == [NEW.fingerprint]
    make_layer(3).save(layers / NEW.fingerprint)
    with pytest.raises(ValueError, match="has another one"):
        repository.refresh()
    assert repository.get("a").layer == OLD


def test_a_list_that_cannot_be_written(root):
    put(root, "a.safetensors", OLD)
    repository = open_repository(root)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for change in (repository.load, repository.unload):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            with pytest.raises(LoadError):
                change("a")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert repository.get("a").layer == OLD
    repository.refresh()
    assert repository.get("a").layer == OLD


def test_a_directory_that_is_gone(root):
    put(root, "a.safetensors", OLD)
    repository = open_repository(root)
    shutil.rmtree(root)
    with pytest.raises(LoadError, match="nothing was changed: No such file"):
        repository.load("a")
    with pytest.raises(NotReadyError, match="cannot be listed: No such file"):
        repository.index()
    assert repository.get("a").layer == OLD


# One process


def test_control_by_tritonclient(control):
    server, root = control
    put(root, "second/1/bn.safetensors", OLD)
    assert index(server)["second", "1"]["state"] == "UNAVAILABLE"
    with triton.InferenceServerClient(server.address) as client:
        assert {entry["name"] for entry in client.get_model_repository_index()} >= {"first", "second"}
        assert not client.is_model_ready("second")
        client.load_model("second")
        assert client.is_model_ready("second", "1")
        assert served(server, "second") == answers_of(OLD)
        put(root, "second/2/bn.safetensors", NEW)
        client.load_model("second")
        assert served(server, "second") == answers_of(NEW)
        assert client.get_model_metadata("second")["versions"] == ["1", "2"]
        client.unload_model("second")
        assert not client.is_model_ready("second")
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="holds no model 'nobody'"):
            client.load_model("nobody")
        with pytest.raises(
            InferenceServerException, match="is not supported: models come from the directory"
        ):
            client.load_model("second", config="{}", files={"file:1/bn.safetensors": b"abc"})
        with pytest.raises(InferenceServerException, match="config is not supported"):
            client.load_model("second", config="{}")


def test_index_says_what_is_ready(control):
    server, root = control
    put(root, "bad.safetensors").write_bytes(b"cut")
    answer = post(server, "models/bad/load")
    assert (answer.status, "bad.safetensors: not a whole" in answer.json()["error"]) == (400, True)
    entry = index(server)["bad", "1"]
    assert (entry["state"], "not a whole safetensors file" in entry["reason"]) == ("UNAVAILABLE", True)
    ready = post(server, "index", {"ready": True}).json()
    assert {"name": "first", "version": "1", "state": "READY", "reason": ""} in ready
    assert all(entry["state"] == "READY" for entry in ready)
    (root / "bad.safetensors").unlink()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("models/%2e%2e/load", None, 404),
        ("models/../load", None, 404),
        ("models/a%2Fb/load", None, 404),
        ("models/a%00b/load", None, 404),
        ("models/%ff/load", None, 404),
        ("models/stats/load", None, 404),
        ("models/" + "n" * 200 + "/unload", None, 404),
        ("elsewhere/index", None, 501),
        ("elsewhere/models/first/load", None, 501),
        ("elsewhere/models/first/unload", None, 501),
        ("models/first/load", [], 400),
        ("models/first/load", {"parameters": []}, 400),
        ("models/first/load", {"parameters": {"config": "{}"}}, 501),
        ("models/first/load", {"parameters": {"file:1/bn.safetensors": "YWJj"}}, 501),
        ("models/first/load", " " * 70_000, 413),
        ("index", {"ready": "yes"}, 400),
        ("index", 1, 400),
    ],
)
def test_refused_control(control, path, body, status):
    server, _ = control
    answer = post(server, path, body)
    assert (answer.status, list(answer.json())) == (status, ["error"])
    assert served(server, "first") == answers_of(OLD)


def test_a_request_in_flight_finishes_on_the_model_it_began_with(control):
    server, root = control
    put(root, "swap.safetensors", OLD)
    assert post(server, "models/swap/load").status == 200
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": X.shape,
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": X.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    request = (
        f"POST /v2/models/swap/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(head) + X.nbytes}\r\n"
        f"Inference-Header-Content-Length: {len(head)}\r\n\r\n"
    )
    with socket.create_connection((server.host, server.port), timeout=20) as slow:
        slow.sendall(request.encode() + head)
        time.sleep(0.1)
        put(root, "swap.safetensors", NEW)
        assert post(server, "models/swap/load").status == 200
        assert served(server, "swap") == answers_of(NEW)
        slow.sendall(X.tobytes())
        response = http.client.HTTPResponse(slow)
        response.begin()
        assert (response.headers["Batchnorm-Fingerprint"], response.read()[-X.nbytes :]) == answers_of(OLD)


def test_control_is_off_unless_asked_for(server):
    for path in ("models/planar/load", "models/planar/unload"):
        answer = post(server, path)
        assert (answer.status, "--control" in answer.json()["error"]) == (403, True)
    assert server.request("GET", "/v2/models/planar/ready").status == 200
    assert index(server)["planar", "10"]["state"] == "READY"


def test_strict_and_single(root, tmp_path):
    put(root, "bn.safetensors", OLD)
    put(root, "3/bn.safetensors").write_bytes(b"cut")
    arguments = ("--model-dir", str(root), "--model-name", "mine")
    result = command(*arguments, "--strict", "--port", "0")
    assert (result.returncode, "'mine' version '3' is not loaded" in result.stderr) == (1, True)
    with serve(tmp_path / "log", *arguments) as server:
        assert served(server, "mine") == answers_of(OLD)
        assert index(server)["mine", "3"]["state"] == "UNAVAILABLE"


def test_strict_with_a_misplaced_file(root):
    put(root, "good.safetensors", OLD)
    put(root, "scale/bn.safetensors", OLD)
    result = command(str(root), "--strict", "--port", "0")
    assert result.returncode == 1
    assert "model 'scale' is not loaded: bn.safetensors must lie in the folder of a version" in result.stderr


def test_a_full_disk(root, tmp_path):
    """A model that cannot be copied is not loaded; the others are served, also after a load that fails."""
    put(root, "small.safetensors", OLD)
    large = bn.FrozenBatchNorm(np.zeros(100_000), np.ones(100_000))
    put(root, "large.safetensors", large)
    size = 2**20

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    with serve(tmp_path / "log", str(root), "--control", preexec_fn=limit) as server:
        assert index(server)["large", "1"]["reason"] == "File too large"
        assert served(server, "small") == answers_of(OLD)
        put(root, "small/2/bn.safetensors", large)
        answer = post(server, "models/small/load")
        assert (answer.status, answer.json()["error"].endswith("version 2: File too large")) == (400, True)
        assert served(server, "small") == answers_of(OLD)


@pytest.mark.skipif(
    sys.platform != "linux", reason="how to make a file unreadable for root is known for Linux"
)
def test_unreadable_files(root, tmp_path):
    put(root, "good.safetensors", OLD)
    put(root, "secret.safetensors", OLD).chmod(0)
    put(root, "folder/1/bn.safetensors", OLD)
    (root / "folder").chmod(0)
    libc = ctypes.CDLL(None)

    def drop():
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, which let root read all
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

    try:
        with serve(tmp_path / "log", str(root), "--control", preexec_fn=drop) as server:
            entries = index(server)
            assert "Permission denied" in entries["secret", "1"]["reason"]
            assert "Permission denied" in entries["folder", None]["reason"]
            (root / "good.safetensors").chmod(0)
            answer = post(server, "models/good/load")
            assert (answer.status, "Permission denied" in answer.json()["error"]) == (400, True)
            assert served(server, "good") == answers_of(OLD)
    finally:
        (root / "folder").chmod(0o700)


# Several processes


def children(server):
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the workers")
def test_two_workers_change_together(root, tmp_path):
    put(root, "a.safetensors", OLD)
    put(root, "b.safetensors", OLD)
    arguments = (str(root), "--workers", "2", "--control")
    with serve(tmp_path / "log", *arguments) as server:
        server.wait_for_log("Application startup complete", 2)
        legal, seen, stop = {answers_of(OLD), answers_of(NEW)}, set(), threading.Event()

        def ask():
            while not stop.is_set():
                seen.add(served(server, "a"))

        asking = threading.Thread(target=ask)
        asking.start()
        for layer in (NEW, OLD, NEW, OLD, NEW):
            put(root, "a.safetensors", layer)
            assert post(server, "models/a/load").status == 200
            # From here on every worker gives the new answer.
            assert {served(server, "a") for _ in range(12)} == {answers_of(layer)}
        stop.set()
        asking.join()
        assert seen == legal  # no answer mixes them
        assert post(server, "models/b/unload").status == 200
        assert {served(server, "b")[0] for _ in range(12)} == {503}

        # A worker that dies is replaced by one that serves the same, whatever the directory holds by now.
        put(root, "a.safetensors", OLD)
        os.kill(children(server)[0], signal.SIGKILL)
        server.wait_for_log("Application startup complete", 3)
        assert {served(server, "a") for _ in range(12)} == {answers_of(NEW)}
        assert {served(server, "b")[0] for _ in range(12)} == {503}
        assert post(server, "models/a/load").status == 200

        # Without their supervisor the workers end too.
        workers = children(server)
        server.process.kill()
        server.process.wait(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "Traceback" not in server.log


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the workers")
def test_a_worker_that_stands_still(root, tmp_path):
    """The change is made, and after 5 seconds the answer says how many workers lag."""
    put(root, "a.safetensors", OLD)
    with serve(tmp_path / "log", str(root), "--workers", "2", "--control") as server:
        server.wait_for_log("Application startup complete", 2)
        stalled = children(server)[0]
        os.kill(stalled, signal.SIGSTOP)
        try:
            put(root, "a.safetensors", NEW)
            answer = post(server, "models/a/load")
            assert (answer.status, "1 of 2 workers" in answer.json()["error"]) == (503, True)
            assert served(server, "a") == answers_of(NEW)
            assert "batchnorm_generation 1.0" in server.request("GET", "/metrics").body.decode()
        finally:
            os.kill(stalled, signal.SIGCONT)
        assert post(server, "models/a/load").status == 200
        assert {served(server, "a") for _ in range(12)} == {answers_of(NEW)}
