"""The file of a frozen whitening layer: docs/format.md to the letter, and what a damaged file brings."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import batchnorm as bn
from batchnorm._kinds import load

HERE = Path(__file__).parent


@pytest.fixture(params=["float32", "float64"])
def layer(request):
    """Two groups of two channels; in both dtypes the header ends in padding."""
    matrix = [[1.1, 0.25], [-3.0, 2.5], [1e-3, 7.0], [0.0, -0.3]]
    return bn.FrozenWhitening(
        matrix, [0.1, -20.0, 3e5, 1.0], [0.3, 0.0, 1e-3, -1.0], channel_axis=-1, dtype=request.param
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bn.safetensors"


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("read", [bn.FrozenWhitening.load, load])
def test_what_is_saved_is_loaded(layer, path, kind, read):
    layer.save(kind(path))
    loaded = read(kind(path))
    assert type(loaded) is bn.FrozenWhitening
    assert loaded == layer
    for name in ("matrix", "mean", "bias"):
        assert getattr(loaded, name).tobytes() == getattr(layer, name).tobytes()
        assert getattr(loaded, name).dtype == layer.dtype
    assert (loaded.groups, loaded.channel_axis, loaded.dtype) == (2, -1, layer.dtype)
    x = np.random.default_rng(0).normal(size=(7, 2, 4)).astype(layer.dtype)
    assert loaded(x).tobytes() == layer(x).tobytes()


def test_a_file_is_of_one_kind(layer, path):
    layer.save(path)
    with pytest.raises(ValueError, match="format 'batchnorm-frozen' wanted, found 'batchnorm-frozen-whit"):
        bn.FrozenBatchNorm.load(path)
    norm = bn.FrozenBatchNorm([1.0], [2.0])
    norm.save(path)
    assert load(path) == norm
    with pytest.raises(ValueError, match="format 'batchnorm-frozen-whitening' wanted, found 'batchnorm-fro"):
        bn.FrozenWhitening.load(path)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="format 'batchnorm-frozen' or 'batchnorm-frozen-whitening' wanted"):
        load(path)


def parts(layer):
    tensors = {name: np.array(getattr(layer, name)) for name in ("matrix", "mean", "bias")}
    metadata = {
        "format": "batchnorm-frozen-whitening",
        "version": "1",
        "channel_axis": "-1",
        "dtype": layer.dtype.name,
        "fingerprint": layer.fingerprint,
    }
    return tensors, metadata


def test_what_the_file_holds(layer, path):
    layer.save(path)
    tensors, metadata = parts(layer)
    found = load_file(path)
    assert sorted(found) == ["bias", "matrix", "mean"]
    assert all(found[name].tobytes() == tensors[name].tobytes() for name in tensors)
    data = path.read_bytes()
    header = json.loads(header_of(data))
    assert header["__metadata__"] == metadata
    assert list(header) == ["__metadata__", "matrix", "mean", "bias"]
    assert [header[name]["shape"] for name in tensors] == [[4, 2], [4], [4]]
    assert data[8 + len(header_of(data)) :] == b"".join(values.tobytes() for values in tensors.values())
    save_file(tensors, path, metadata)  # writes tensors by name and metadata in any order
    assert list(json.loads(header_of(path.read_bytes())))[1:] == ["bias", "matrix", "mean"]
    assert bn.FrozenWhitening.load(path) == layer


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
                    loaded = load(path)
                except ValueError as error:
                    refusals.add(str(error))
                    continue
                survived.add(position)
                assert loaded == layer
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert survived == padding
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)
    assert load(path) == layer


def test_every_shortened_file_is_refused(layer, path):
    layer.save(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            bn.FrozenWhitening.load(path)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("version", "2", "of version '1' wanted, found '2'"),
        ("version", None, "of version '1' wanted, found None"),
        ("eps", "0x0p+0", "metadata format, version, channel_axis, dtype, fingerprint wanted, found .*eps"),
        ("groups", "2", "metadata .* wanted, found .*groups"),
        ("fingerprint", None, "metadata .* wanted, found"),
        ("channel_axis", "1", "fingerprint is"),
        ("channel_axis", " -1", "channel_axis is ' -1', but that of the layer is '-1'"),
        ("channel_axis", "first", "damaged"),
        ("dtype", "float16", r"matrix of float16 and shape \(channels, D\); mean, bias of float16 and shape"),
        ("fingerprint", "0" * 64, "fingerprint is '0+', but that of the layer is"),
    ],
)
def test_refused_metadata(layer, path, key, value, match):
    tensors, metadata = parts(layer)
    metadata = {k: v for k, v in (metadata | {key: value}).items() if v is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=match) as caught:
        bn.FrozenWhitening.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("bias"), r"mean, bias of float\d\d and shape \(channels,\) wanted, found matrix"),
        (lambda t: t.update(more=t["bias"]), "found .*more"),
        (lambda t: t.update(bias=t["bias"][:3]), r"bias float\d\d\(3,\)"),
        (lambda t: t.update(bias=t["bias"].astype(np.float16)), r"bias float16\(4,\)"),
        (lambda t: t.update(matrix=t["matrix"].ravel()), r"matrix float\d\d\(8,\)"),
        (lambda t: t.update(matrix=t["matrix"].reshape(2, 4)), r"matrix float\d\d\(2, 4\)"),
        (lambda t: t.update(matrix=np.ones((4, 3), t["mean"].dtype)), r"damaged: matrix: shape was \(4, 3\)"),
        (lambda t: t.update(matrix=np.ones((4, 4), t["mean"].dtype)), "fingerprint is"),
        (lambda t: t.update(matrix=np.full_like(t["matrix"], np.nan)), "damaged: matrix: not finite"),
        (lambda t: t.update(mean=t["bias"], bias=t["mean"]), "fingerprint is"),
        (lambda t: t.clear(), "found no tensors"),
    ],
)
def test_refused_tensors(layer, path, change, match):
    tensors, metadata = parts(layer)
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=match) as caught:
        bn.FrozenWhitening.load(path)
    assert str(path) in str(caught.value)


def test_version_1_loads_for_ever():
    """The file and the result beside it were made once, by the first code that wrote version 1."""
    frozen = bn.FrozenWhitening.load(HERE / "data" / "frozen_whitening_v1.safetensors")
    assert frozen.fingerprint == "042c1eb1060d505621fa20fa3d2a965af1cdb8e8c22f95c09ebad8c44f3b296c"
    assert (frozen.channels, frozen.groups, frozen.channel_axis) == (6, 2, 1)
    with np.load(HERE / "data" / "frozen_whitening_v1_inference.npz") as stored:
        x, y = stored["x"], stored["y"]
    assert x.shape == y.shape == (4, 6, 5)
    assert frozen(x).tobytes() == y.tobytes()
