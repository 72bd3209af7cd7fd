"""A trained model of others, from PyPI, through every verb: it finds lines of text that are upside down."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import PackageNotFoundError, files

import numpy as np
import onnx
import pytest

import text_lines
from batchnorm.onnx import fold, frozen_layers, lint, recalibrate, replace_layers
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


def test_recalibrated_layers_normalize_what_they_see(path, lines):
    """Over the calibration data each gives its β and γ as mean and standard deviation.

    These lines are far less varied than what the model was trained on, so its answers do not become better.
    """
    x = lines[0][:64]
    new, report = recalibrate(path, x, layerwise=True, population="pooled")
    assert len(report.layers) == NORMALIZATIONS
    layers = frozen_layers(new)
    nodes = [node for node in new.graph.node if node.op_type == "BatchNormalization"]
    assert [node.name for node in nodes] == [*layers]
    new.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in nodes)
    outputs = run(new, {"x": x}, [node.output[0] for node in nodes], optimize=False)
    for y, layer in zip(outputs, layers.values(), strict=True):
        y = y.astype(np.float64)
        bare = np.sqrt(layer.var / (layer.var + layer.eps))
        assert np.allclose(y.mean((0, 2, 3)), layer.beta, rtol=1e-3, atol=1e-3)
        assert np.allclose(y.std((0, 2, 3)), np.abs(layer.gamma) * bare, rtol=1e-2, atol=1e-3)


def test_it_is_folded_and_checked(path, lines):
    assert Counter(finding.name for finding in lint(path)) == {"unfolded": NORMALIZATIONS}
    folded, report = fold(path, inputs={"x": lines[0][:32]})
    assert report.folded == len(report.nodes) == NORMALIZATIONS
    assert report.errors[0].absolute < 1e-4  # of probabilities
    assert accuracy(folded, lines) == accuracy(onnx.load(path), lines)
