"""The model layer: which files become which models, without HTTP."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from serving import CHANNELS, make_layer

from batchnorm_service.errors import InvalidInputError, ModelNotFoundError, NotReadyError
from batchnorm_service.models.directory import Directory, _unfollowed
from batchnorm_service.models.model import Model
from batchnorm_service.models.repository import Repository
from batchnorm_service.models.shared_state import SharedState


@pytest.fixture
def root(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def open_repository(root, name=None):
    """The repository of a single process, as it is when the process has started."""
    shared = root.parent / "shared"
    shared.mkdir(exist_ok=True)
    repository = Repository(Directory(root, name), SharedState(shared))
    repository.load_all()
    repository.refresh()
    return repository


def put(root, path, layer=None):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    (layer or make_layer(7)).save(file)
    return file


def test_no_web_framework_is_loaded():
    code = "import sys, batchnorm_service.protocol.exchange; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(output.split())
    assert "batchnorm_service.models.model" in loaded
    assert not {"fastapi", "starlette", "uvicorn", "pydantic"} & loaded


def test_both_layouts_and_default_version(root):
    nine, ten, flat = make_layer(1), make_layer(2), make_layer(3)
    put(root, "a/9/bn.safetensors", nine)
    put(root, "a/10/bn.safetensors", ten)
    put(root, "b.v2.safetensors", flat)
    repository = open_repository(root)
    assert repository.ready
    assert repository.names() == ["a", "b.v2"]
    assert repository.versions("a") == ["9", "10"]
    assert repository.get("a").version == "10"
    assert repository.get("a").layer == ten
    assert repository.get("a", "9").layer == nine
    assert repository.get("b.v2", "1").layer == flat


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("stats.safetensors", "reserved"),
        (".hidden.safetensors", "name must match"),
        ("a b.safetensors", "name must match"),
        ("%2e%2e.safetensors", "name must match"),
        ("é.safetensors", "name must match"),
        ("n" * 129 + ".safetensors", "name must match"),
        ("a/01/bn.safetensors", "version must match"),
        ("a/0/bn.safetensors", "version must match"),
        ("a/-1/bn.safetensors", "version must match"),
        ("a/latest/bn.safetensors", "version must match"),
        ("a/1" + "0" * 18 + "/bn.safetensors", "version must match"),
    ],
)
def test_refused_names(root, caplog, path, reason):
    put(root, path)
    good = "n" * 128
    put(root, f"{good}.safetensors")
    with caplog.at_level(logging.ERROR):
        repository = open_repository(root)
    assert repository.names() == [good]
    assert reason in caplog.text


WANTED = "one of bn.safetensors, bn.onnx, model.onnx is wanted, found "


@pytest.mark.parametrize(
    ("paths", "version", "reason"),
    [
        (
            ["a/bn.safetensors"],
            "",
            "bn.safetensors must lie in the folder of a version, as a/1/bn.safetensors",
        ),
        (["a/x.ONNX", "a/b.SafeTensors"], "", "b.SafeTensors, x.ONNX must lie in the folder of a version"),
        (["a.SAFETENSORS"], "1", "the suffix must be .safetensors, not .SAFETENSORS"),
        (["a.Onnx"], "1", "the suffix must be .onnx, not .Onnx"),
        (["a/1/"], "1", WANTED + "none"),
        (["a/1/readme.txt"], "1", WANTED + "none"),
        (["a/1/bn.Safetensors"], "1", WANTED + "bn.Safetensors"),
        (["a/1/scale.safetensors"], "1", WANTED + "scale.safetensors"),
        (["a/1/bn.safetensors", "a/1/bn.onnx"], "1", WANTED + "bn.safetensors, bn.onnx"),
        (["a/007/"], "007", "the version must match"),
        (["a/v1/scale.safetensors"], "v1", "the version must match"),
    ],
)
def test_what_looks_like_a_model_is_served_or_named(root, caplog, paths, version, reason):
    """In the log and in the index, with what is wanted; the rest is served."""
    put(root, "good/2/bn.safetensors")
    for folder in ("empty", "notes", ".hidden/1"):
        (root / folder).mkdir(parents=True)
    (root / "notes" / "text.md").write_text("no model")
    for path in paths:
        (root / path).mkdir(parents=True) if path.endswith("/") else put(root, path)
    repository = open_repository(root)
    found = {(entry.name, entry.version): entry.reason for entry in repository.index()}
    assert found.keys() == {("good", "2"), ("a", version)}
    assert found["good", "2"] == ""
    assert reason in found["a", version]
    assert reason in caplog.text


def test_a_misplaced_file_does_not_stop_the_versions(root):
    put(root, "a/1/bn.safetensors")
    put(root, "a/bn.safetensors")
    put(root, "b.SAFETENSORS", make_layer(1))
    put(root, "b.safetensors", make_layer(2))
    repository = open_repository(root)
    assert repository.names() == ["a", "b"]
    assert repository.get("b").layer == make_layer(2)
    assert {entry.name for entry in repository.index() if not entry.fingerprint} == {"a"}


@pytest.mark.parametrize("path", ["BN.safetensors", "scale.onnx"])
def test_a_directory_that_is_one_model_names_what_it_expected(root, caplog, path):
    put(root, path)
    put(root, "3/bn.safetensors")
    repository = open_repository(root, "a")
    assert repository.versions("a") == ["3"]
    found = [(entry.version, entry.reason) for entry in repository.index() if not entry.fingerprint]
    assert found == [("1", WANTED + path)]
    assert WANTED + path in caplog.text


def test_nothing_outside_the_root_is_opened(root, caplog):
    outside = put(root.parent, "outside/1/bn.safetensors")
    (root / "file.safetensors").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent.parent)
    inside = put(root, "real/1/bn.safetensors")
    (root / "alias.safetensors").symlink_to(inside)
    repository = open_repository(root)
    assert repository.names() == ["alias", "real"]
    assert caplog.text.count("a symbolic link leaves the directory") == 2
    for name in ("file", "folder"):
        with pytest.raises(NotReadyError):
            repository.get(name)


def test_a_link_or_a_pipe_may_not_take_the_place_of_a_file(root):
    """Between the look at it and its opening."""
    path = put(root, "a.safetensors")
    with open(path, "rb", opener=_unfollowed) as file:
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_NONBLOCK  # to open a pipe does not wait for its writer
    (root / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        _unfollowed(str(root / "link"), os.O_RDONLY)


def test_a_bad_file_does_not_stop_the_others(root, caplog):
    put(root, "good.safetensors")
    put(root, "axis.safetensors", make_layer(1, channel_axis=10**12))
    put(root, "cut/3/bn.safetensors").write_bytes(b"cut")
    put(root, "cut/2/bn.safetensors")
    (root / "loop.safetensors").symlink_to("loop.safetensors")
    (root / "folder.safetensors").mkdir()
    os.mkfifo(root / "pipe.safetensors")
    repository = open_repository(root)
    assert repository.names() == ["cut", "good"]
    assert repository.get("cut").version == "2"
    for name, version in (("cut", "3"), ("axis", None), ("loop", None), ("folder", "1"), ("pipe", None)):
        with pytest.raises(NotReadyError, match=name):
            repository.get(name, version)
        assert f"model '{name}'" in caplog.text
    assert caplog.text.count("not a regular file") == 2


def test_a_version_in_both_layouts_is_served_once(root, caplog):
    folder = make_layer(1)
    put(root, "a/1/bn.safetensors", folder)
    put(root, "a.safetensors", make_layer(2))
    repository = open_repository(root)
    assert repository.get("a", "1").layer == folder
    assert "seen already" in caplog.text


def test_lookups(root, caplog):
    put(root, "a.safetensors")
    repository = open_repository(root)
    for name in ("b", "", "..", "a/1", "A", "n" * 200, str(root / "a")):
        with pytest.raises(ModelNotFoundError):
            repository.get(name)
    for version in ("2", "0", "", "01", "1 ", "x", "1" * 30):
        with pytest.raises(ModelNotFoundError):
            repository.get("a", version)
    assert not caplog.records


def test_no_model(root, caplog):
    repository = open_repository(root)
    assert not repository.ready
    assert repository.names() == []
    assert "not be ready" in caplog.text
    with pytest.raises(FileNotFoundError):
        open_repository(root / "missing")


@pytest.mark.parametrize(
    ("axis", "shape"),
    [
        (1, (-1, CHANNELS)),
        (-1, (-1, CHANNELS)),
        (0, (CHANNELS, -1)),
        (-2, (CHANNELS, -1)),
        (2, (-1, -1, CHANNELS)),
        (-3, (CHANNELS, -1, -1)),
    ],
)
def test_shape_is_the_lowest_rank_that_the_layer_takes(axis, shape):
    model = Model("a", "1", make_layer(1, channel_axis=axis))
    assert model.shape == shape
    x = np.ones([3 if size == -1 else size for size in shape], np.float32)
    assert model.infer(x).shape == x.shape


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_are_those_that_the_layer_takes(dtype):
    model = Model("a", "1", make_layer(1, dtype=dtype))
    assert model.dtypes[0] == dtype
    for given in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int32):
        x = np.ones((2, CHANNELS), given)
        if x.dtype.name in model.dtypes:
            assert model.infer(x).dtype == x.dtype
        else:
            with pytest.raises(InvalidInputError):
                model.infer(x)


def test_infer_writes_where_it_is_told():
    model = Model("a", "1", make_layer(1))
    x = np.arange(3 * CHANNELS, dtype=np.float32).reshape(3, CHANNELS)
    memory = bytearray(x.nbytes + 3)
    out = np.ndarray(x.shape, x.dtype, buffer=memory, offset=3)
    model.infer(x, out=out)
    assert bytes(memory[3:]) == model.layer(x).tobytes()
    with pytest.raises(InvalidInputError, match="x"):
        model.infer(x[:, :-1])
