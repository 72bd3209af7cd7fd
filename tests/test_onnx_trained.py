"""A trained model of others, from PyPI, through every verb: it finds lines of text that are upside down."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files

import numpy as np
import onnx
import pytest

import text_lines
from batchnorm.onnx import frozen_layers, replace_layers
from onnx_models import run

pytestmark = pytest.mark.long
PACKAGE = "rapidocr-onnxruntime"
NORMALIZATIONS = 35


@pytest.fixture(scope="module")
def path():
    try:
        listed = files(PACKAGE) or []
    except PackageNotFoundError:
        pytest.skip(f"no {PACKAGE}: `make test-long` installs it")
    (found,) = [file for file in listed if file.name == "ch_ppocr_mobile_v2.0_cls_infer.onnx"]
    return found.locate()


@pytest.fixture(scope="module")
def lines():
    return text_lines.lines(np.random.default_rng(0), 128)


def accuracy(model, lines):
    x, labels = lines
    return np.mean(run(model, {"x": x})[0].argmax(axis=1) == labels)


def test_it_tells_lines_that_are_upside_down(path, lines):
    """Otherwise the images are not what it was trained on, and nothing here would tell anything."""
    assert accuracy(onnx.load(path), lines) > 0.85


def test_layers_are_read_and_put_back(path, lines):
    layers = frozen_layers(path)
    assert len(layers) == NORMALIZATIONS
    assert replace_layers(path, layers).SerializeToString() == onnx.load(path).SerializeToString()
    scrambled = {key: type(layer)(layer.mean[::-1], layer.var[::-1]) for key, layer in layers.items()}
    assert accuracy(replace_layers(path, scrambled), lines) < 0.75
