"""Whole models through one verb after the other, and what they compute at the end."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm.onnx import fold, frozen_layers, lint, recalibrate, replace_layers
from onnx_models import FOLDED, NORMALIZATIONS, real_graph, run


@pytest.mark.filterwarnings("ignore:.*constant over the data")  # behind Relus that are never active
@pytest.mark.long
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_real_graphs_through_all_verbs(name):
    model = real_graph(name)
    assert sum(finding.name == "unfolded" for finding in lint(model)) == NORMALIZATIONS[name]
    (entry,) = (e for e in model.graph.input if e.name not in {t.name for t in model.graph.initializer})
    shape = [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
    images = np.random.default_rng(0).normal(size=(3, *shape[1:])).astype(np.float32)

    recalibrated, measured = recalibrate(model, images)
    assert measured.population == "pooled", measured.reason  # the graph fixes a batch of one image
    assert len(measured.layers) == NORMALIZATIONS[name]
    layers = frozen_layers(recalibrated)
    assert not any(np.array_equal(layers[key].mean, old.mean) for key, old in frozen_layers(model).items())
    assert replace_layers(model, layers).SerializeToString() == recalibrated.SerializeToString()

    folded, report = fold(recalibrated)
    assert len(report.nodes) == NORMALIZATIONS[name]
    assert report.folded == FOLDED[name]
    assert len(frozen_layers(folded)) == NORMALIZATIONS[name] - FOLDED[name]
    outputs = [run(each, {entry.name: images[:1]})[0] for each in (model, recalibrated, folded)]
    assert np.abs(outputs[2] - outputs[1]).max() <= 1e-3 * np.abs(outputs[1]).max()
    assert np.abs(outputs[1] - outputs[0]).max() > 1e-3 * np.abs(outputs[0]).max()
