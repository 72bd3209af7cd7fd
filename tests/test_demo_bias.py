"""The demonstration of section 2: the bias by the gradient that ignores the mean, and by ours."""

from __future__ import annotations

import re

import numpy as np
import pytest
from click.testing import CliRunner

from batchnorm.cli import main
from batchnorm.demo.bias import RATE, descend

STEPS = 2000
ULP = np.finfo(np.float64).eps


@pytest.fixture(scope="module")
def ignored():
    return descend(STEPS, through_statistics=False)


@pytest.fixture(scope="module")
def ours():
    return descend(STEPS, through_statistics=True)


def test_the_bias_grows_linearly_if_the_mean_is_taken_as_a_constant(ignored):
    # The targets have mean 1 and x̂ has mean 0, so ∂ℓ/∂x̂ sums to −1, at every step.
    np.testing.assert_allclose(ignored.b, RATE * np.arange(STEPS + 1), rtol=1e-12)
    assert ignored.b[-1] > 100


def test_the_loss_stays_the_same_to_rounding(ignored, ours):
    # x̂ is known to about an ulp of x, which has grown to 200.
    np.testing.assert_allclose(ignored.loss, ignored.loss[0], rtol=10 * ULP * ignored.b[-1])
    np.testing.assert_allclose(ours.loss, ours.loss[0], rtol=10 * ULP)
    assert ignored.loss[0] == ours.loss[0] > 0.5  # no output with mean 0 does better than ½·1²


def test_the_bias_stays_at_zero_to_rounding_with_the_gradient_through_the_mean(ours):
    # At each step the sum of 60 gradients that cancel, each of less than 1/10.
    assert abs(ours.b).max() < STEPS * RATE * 6 * ULP
    assert len(ours.b) == STEPS + 1


def test_another_seed_tells_the_same():
    ignored, ours = (descend(50, through_statistics=through, seed=7) for through in (False, True))
    assert ignored.b[-1] == pytest.approx(5)
    assert abs(ours.b[-1]) < 1e-13
    assert ignored.loss[0] != descend(0, through_statistics=True).loss[0]


def test_the_command(tmp_path):
    folder = tmp_path / "new" / "folder"
    result = CliRunner().invoke(main, ["demo", "bias", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {"bias.png", "report.md"}
    assert (folder / "bias.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (folder / "report.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", report, re.M)
    assert [int(row[0]) for row in rows] == [0, 1, 10, 100, 1000, 10_000]
    assert len({loss for row in rows for loss in (row[1], row[3])}) == 1
    assert float(rows[-1][2]) == pytest.approx(1000)
    assert abs(float(rows[-1][4])) < 1e-12
    for row in rows:
        assert re.search(r" +│ ".join(map(re.escape, row)), result.stdout)
