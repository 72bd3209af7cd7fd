"""The demonstration of recalibration."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from batchnorm.cli import main
from batchnorm.demo.network import PIXELS, dense_network, load_digits
from batchnorm.demo.onnx_model import to_onnx
from batchnorm.demo.recalibrate import measure, quantized
from onnx_models import run

PAGE = Path(__file__).parent.parent / "docs" / "recalibration.md"


def rows(text):
    """The rows of the table by what they are of, as fractions."""
    found = re.findall(r"^\| (.+?) \| (\S+)% \| (\S+)% \| (\S+)% \|$", text, re.M)
    return {what: np.array(cells, float) / 100 for what, *cells in found}


def test_weights_have_few_bits():
    digits = load_digits()
    network = dense_network(PIXELS, normalized=True)
    model = to_onnx(network.freeze(digits.batches(np.random.default_rng(0), 5)))
    for bits in (8, 3):
        new = quantized(model, bits)
        weights = {t.name.removesuffix(".int8"): onnx.numpy_helper.to_array(t) for t in new.graph.initializer}
        integers = [values for values in weights.values() if values.dtype == np.int8]
        assert len(integers) == 4
        assert all(abs(values).max() == 2 ** (bits - 1) - 1 for values in integers)
    logits = [run(m, {"x": digits.held_out_x})[0] for m in (model, quantized(model, 8))]
    assert 0 < abs(logits[0] - logits[1]).max() < 0.1 * abs(logits[0]).max()


def test_layerwise_recalibration_takes_the_change_of_the_data_back():
    found = {row.what: row for row in measure(steps=200, advance=lambda accuracy: None)}
    assert len(found) == 7
    fresh = found["float32 weights, the same data"]
    assert abs(fresh.layerwise - fresh.before) < 0.02
    for row in found.values():
        if "·x" in row.what:
            assert row.before < fresh.before - 0.05
            assert row.layerwise == pytest.approx(fresh.layerwise, abs=0.01)
    assert found["3-bit weights, the same data"].layerwise > found["3-bit weights, the same data"].before


def test_the_command_prints_the_table_of_the_page(tmp_path):
    folder = tmp_path / "new" / "folder"
    result = CliRunner().invoke(main, ["demo", "recalibrate", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    report = rows((folder / "report.md").read_text("utf-8"))
    page = rows(PAGE.read_text("utf-8"))
    assert report.keys() == page.keys()
    assert len(page) == 7
    for what, accuracies in page.items():
        # Matrix products of another machine may round otherwise; 2 bits leave chaos.
        assert abs(report[what] - accuracies).max() < (0.2 if "2-bit" in what else 0.03), what
        assert what in result.stdout


def test_other_steps_are_refused(tmp_path):
    result = CliRunner().invoke(
        main, ["demo", "recalibrate", "--output", str(tmp_path / "n"), "--steps", "15"]
    )
    assert result.exit_code == 2
    assert "steps: was 15, wanted a multiple of 10" in result.stderr
    assert not (tmp_path / "n").exists()
