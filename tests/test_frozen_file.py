"""The file of a frozen layer: docs/format.md to the letter, and what a damaged or foreign file brings."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import batchnorm as bn

HERE = Path(__file__).parent
EPS = "0x1.4f8b580000000p-17"


@pytest.fixture(params=["float32", "float64"])
def layer(request):
    """In both dtypes the header ends in padding, of which a test wants to see some."""
    mean, var, gamma, beta = [0.1, -20.0, 3e5], [0.5, 2.0, 1e4], [1.1, 0.0, -2.0], [0.3, 0.0, 1e-3]
    return bn.FrozenBatchNorm(mean, var, gamma, beta, channel_axis=2, dtype=request.param)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bn.safetensors"


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length]


def test_the_examples_in_the_specification(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HERE.parent / "docs" / "format.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/format.md", "exec"), {})
    assert sorted(path.name for path in Path().iterdir()) == ["bn.safetensors", "whitening.safetensors"]


@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_saved_is_loaded(layer, path, kind):
    layer.save(kind(path))
    loaded = bn.FrozenBatchNorm.load(kind(path))
    assert loaded == layer
    for name in ("mean", "var", "gamma", "beta"):
        assert getattr(loaded, name).tobytes() == getattr(layer, name).tobytes()
        assert getattr(loaded, name).dtype == layer.dtype
    assert (loaded.eps, loaded.channel_axis, loaded.dtype) == (layer.eps, layer.channel_axis, layer.dtype)
    x = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(layer.dtype)
    assert loaded(x).tobytes() == layer(x).tobytes()


def test_the_safetensors_package_reads_it(layer, path):
    layer.save(path)
    tensors = load_file(path)
    assert sorted(tensors) == ["beta", "gamma", "mean", "var"]
    for name, values in tensors.items():
        assert values.tobytes() == getattr(layer, name).tobytes()


def test_the_same_layer_makes_the_same_bytes(layer, tmp_path):
    """In another process too, whose hashes are seeded differently."""
    layer.save(tmp_path / "here")
    again = f"""
import batchnorm as bn
layer = bn.FrozenBatchNorm.load({str(tmp_path / "here")!r})
layer.save({str(tmp_path / "there")!r})
"""
    subprocess.run([sys.executable, "-c", again], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


def test_every_flipped_byte_is_refused_or_is_padding(layer, path):
    """Each byte with each of its bits flipped, with all, and as one space of JSON flips into the others."""
    layer.save(path)
    data = path.read_bytes()
    header = header_of(data)
    padding = set(range(8 + len(header.rstrip()), 8 + len(header)))
    assert padding
    masks = [1 << bit for bit in range(8)] + [0xFF] + [ord(" ") ^ ord(space) for space in "\t\n\r"]
    survived, refusals = set(), set()
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(data):
            for mask in masks:
                os.pwrite(file.fileno(), bytes([byte ^ mask]), position)
                try:
                    loaded = bn.FrozenBatchNorm.load(path)
                except ValueError as error:
                    refusals.add(str(error))
                    continue
                survived.add(position)
                assert loaded == layer
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert survived == padding
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)
    assert bn.FrozenBatchNorm.load(path) == layer


def test_every_shortened_file_is_refused(layer, path):
    layer.save(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            bn.FrozenBatchNorm.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        bn.FrozenBatchNorm.load(path)


def parts(layer):
    tensors = {name: np.array(getattr(layer, name)) for name in ("gamma", "beta", "mean", "var")}
    metadata = {
        "format": "batchnorm-frozen",
        "version": "1",
        "channel_axis": "2",
        "eps": EPS,
        "dtype": layer.dtype.name,
        "fingerprint": layer.fingerprint,
    }
    return tensors, metadata


def test_a_file_in_another_order_is_read(layer, path):
    tensors, metadata = parts(layer)
    save_file(tensors, path, metadata)  # writes tensors by name and metadata in any order
    assert list(json.loads(header_of(path.read_bytes())))[1:] == ["beta", "gamma", "mean", "var"]
    assert bn.FrozenBatchNorm.load(path) == layer


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "other", "of format 'batchnorm-frozen' wanted, found 'other'"),
        ("format", None, "of format 'batchnorm-frozen' wanted, found None"),
        ("version", "2", "of version '1' wanted, found '2'"),
        ("version", "01", "of version '1' wanted, found '01'"),
        ("version", None, "of version '1' wanted, found None"),
        ("eps", None, "metadata format, version, .*, fingerprint wanted, found channel_axis, dtype, finger"),
        ("fingerprint", None, "metadata .* wanted, found"),
        ("comment", "hello", "metadata .* wanted, found .*comment"),
        ("channel_axis", "1", "fingerprint is"),
        ("channel_axis", " 2", "channel_axis is ' 2', but that of the layer is '2'"),
        ("channel_axis", "first", "damaged"),
        ("channel_axis", "9" * 30, "channel_axis: was 9+, wanted an integer of 64 bits"),
        ("eps", "1e-5", "eps is '1e-5', not a hexadecimal float"),
        ("eps", "0x1.4f8b588e368f1p-17", "eps is not rounded as the format requires"),
        ("eps", EPS.upper(), "eps is '0X1.4F8B58"),
        ("eps", "0x1p+99999", "eps is '0x1p.99999', not a hexadecimal float"),
        ("eps", "small", "eps is 'small', not a hexadecimal float"),
        ("eps", "-" + EPS, "eps"),
        ("eps", "nan", "eps"),
        ("dtype", "float16", "of float16 and shape"),
        ("fingerprint", "0" * 64, "fingerprint is '0+', but that of the layer is"),
    ],
)
def test_refused_metadata(layer, path, key, value, match):
    tensors, metadata = parts(layer)
    metadata = {k: v for k, v in (metadata | {key: value}).items() if v is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=match) as caught:
        bn.FrozenBatchNorm.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("beta"), r"gamma, beta, mean, var of float\d\d and shape \(channels,\) wanted, fo"),
        (lambda t: t.update(more=t["beta"]), "found .*more"),
        (lambda t: t.update(beta=t["beta"].reshape(1, 3)), r"beta float\d\d\(1, 3\)"),
        (lambda t: t.update(beta=t["beta"][:1]), r"beta float\d\d\(1,\)"),
        (lambda t: t.update(beta=t["beta"].astype(np.float16)), r"beta float16\(3,\)"),
        (lambda t: t.update({k: v.view(f"i{v.itemsize}") for k, v in t.items()}), r"beta int\d\d\(3,\)"),
        (lambda t: t.update(mean=np.full_like(t["mean"], np.nan)), "mean"),
        (lambda t: t.update(var=-t["var"]), "var"),
        (lambda t: t.update(mean=t["var"], var=np.abs(t["mean"])), "fingerprint is"),
        (lambda t: t.clear(), "found no tensors"),
    ],
)
def test_refused_tensors(layer, path, change, match):
    tensors, metadata = parts(layer)
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=match) as caught:
        bn.FrozenBatchNorm.load(path)
    assert str(path) in str(caught.value)


def test_what_is_not_a_file_of_ours(layer, path, tmp_path):
    with pytest.raises(FileNotFoundError):
        bn.FrozenBatchNorm.load(path)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        bn.FrozenBatchNorm.load(tmp_path)
    path.write_text("hello, world; this is no safetensors file")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        bn.FrozenBatchNorm.load(path)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="format 'batchnorm-frozen' wanted, found None"):
        bn.FrozenBatchNorm.load(path)


def test_saving_replaces_and_leaves_nothing_else(layer, path):
    path.write_text("something older")
    before = os.umask(0o027)
    try:
        layer.save(path)
    finally:
        os.umask(before)
    assert bn.FrozenBatchNorm.load(path) == layer
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o640


def test_bytes_reach_the_disk_before_the_name_and_then_the_name(layer, path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    layer.save(path)
    assert synced == [(False, False), (True, True)]


def test_a_save_that_fails_leaves_the_old_file(layer, path):
    """A limit on the size of files stands for a full disk."""
    layer.save(path)
    before = path.read_bytes()
    too_big = f"""
import resource
import batchnorm as bn
layer = bn.FrozenBatchNorm([0.0] * 10_000, [1.0] * 10_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    layer.save({str(path)!r})
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", too_big], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("refused:")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_saving_into_no_directory(layer, tmp_path):
    with pytest.raises(FileNotFoundError):
        layer.save(tmp_path / "missing" / "bn.safetensors")


def test_version_1_loads_for_ever():
    """The file and the result beside it were made once, by the first code that wrote version 1."""
    frozen = bn.FrozenBatchNorm.load(HERE / "data" / "frozen_v1.safetensors")
    assert frozen.fingerprint == "e73128d38c1569d1fe161df85b7ef38cba88a6899cf4e4fb52abf14f5e714f05"
    with np.load(HERE / "data" / "frozen_v1_inference.npz") as stored:
        x, y = stored["x"], stored["y"]
    assert x.shape == y.shape == (4, 5, 6)
    assert frozen(x).tobytes() == y.tobytes()
