"""The demonstration of section 4.1, with few steps and seeds."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import batchnorm.cli
from batchnorm.demo import paper
from batchnorm.demo.network import dense_network, load_mnist
from batchnorm.demo.paper import EVERY, SPREADS, Experiment
from batchnorm.demo.training import train

STEPS, SEEDS = 100, (1, 2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "new" / "folder"
    paper.main(folder, steps=STEPS, seeds=SEEDS)
    with np.load(folder / "paper.npz") as file:
        return SimpleNamespace(folder=folder, found=dict(file), report=(folder / "report.md").read_text())


def test_the_digits():
    digits = load_mnist()
    assert digits.x.shape == (4000, 784)
    assert np.bincount(digits.digit).tolist() == [400] * 10
    assert np.bincount(digits.held_out_digit).tolist() == [100] * 10
    assert set(np.unique(digits.x)) == {0, 1}
    assert (
        len(np.unique(np.vstack((digits.x, digits.held_out_x)), axis=0)) > 4900
    )  # no image is in both parts


def test_the_weights_have_the_spread_that_is_asked_for():
    for spread in SPREADS:
        networks = [dense_network(784, normalized=n, seed=3, spread=spread) for n in (False, True)]
        weights = [[layer.weight for layer in net.layers if hasattr(layer, "weight")] for net in networks]
        assert [w.shape for w in weights[0]] == [(784, 100), (100, 100), (100, 100), (100, 10)]
        for plain, normalized in zip(*weights, strict=True):
            assert np.array_equal(plain, normalized)
            assert plain.std() == pytest.approx(spread, rel=0.1)


def test_what_it_leaves_behind(ran):
    assert {path.name for path in ran.folder.iterdir()} == {"paper.npz", "paper.png", "report.md"}
    assert (ran.folder / "paper.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    evaluations = STEPS // EVERY
    assert ran.found["step"].tolist() == list(range(EVERY, STEPS + 1, EVERY))
    for name in ("plain", "normalized"):
        assert ran.found[f"accuracy_{name}"].shape == (len(SPREADS), len(SEEDS), evaluations)
        assert ran.found[f"percentiles_{name}"].shape == (len(SPREADS), len(SEEDS), evaluations, 100, 3)
        assert (np.diff(ran.found[f"percentiles_{name}"]) >= 0).all()


def test_the_normalized_network_is_ahead_after_a_hundred_steps(ran):
    assert ran.found["accuracy_normalized"][..., -1].min() > 0.7
    assert ran.found["accuracy_plain"][..., -1].max() < 0.6


def test_the_percentiles_are_of_the_input_of_the_last_hidden_sigmoid(ran):
    """Of β + γ·x̂, not of x; and of Wu + b where there is no batch norm."""
    digits = load_mnist()
    for k, normalized in enumerate((False, True)):
        network = dense_network(784, normalized=normalized, seed=SEEDS[1], spread=SPREADS[1])
        rate = float(ran.found["rate"][1])
        train(network, digits, rate=rate, steps=EVERY, advance=lambda _: None, every=EVERY, seed=SEEDS[1])
        x = digits.held_out_x
        for norm in network.norms:
            norm.eval()
        for layer in network.layers[:-2]:  # the last hidden sigmoid and the dense layer of the logits
            x = layer(x)
        expected = np.percentile(x, [15, 50, 85], axis=0).T
        seen = ran.found[("percentiles_plain", "percentiles_normalized")[k]][1, 1, 0]
        np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)


def test_best_and_steps_to_it():
    plain = np.array([[0.1, 0.5, 0.4], [0.2, 0.3, 0.6]])
    normalized = np.array([[0.5, 0.7, 0.6], [0.1, 0.2, 0.3]])
    one = Experiment(0.1, 1.0, {False: plain, True: normalized}, {})
    goal = one.best(False)
    assert goal.tolist() == [0.5, 0.6]
    assert one.steps_to(goal, False).tolist() == [2 * EVERY, 3 * EVERY]
    assert one.steps_to(goal, True).tolist() == [EVERY, np.inf]


def test_the_report_states_what_the_arrays_hold(ran):
    best = 100 * ran.found["accuracy_normalized"].max(-1)
    for spread, of_seeds in zip(SPREADS, best, strict=True):
        row = re.search(rf"^\| {spread} \| \S+ \| normalized \| (\S+) \((\S+)–(\S+)\) \|", ran.report, re.M)
        stated = [float(cell) for cell in row.groups()]
        assert stated == pytest.approx([np.median(of_seeds), of_seeds.min(), of_seeds.max()], abs=0.051)
    assert f" {STEPS} steps" in ran.report
    assert "(paper.png)" in ran.report


def test_never_is_said():
    assert paper._spread(np.array([20.0, 40.0, np.inf]), "{:.0f}") == "40 (20–never)"


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps: was 19, wanted 20 or more"):
        paper.main(tmp_path / "none", steps=19)
    assert not (tmp_path / "none").exists()
    result = CliRunner().invoke(batchnorm.cli.main, ["demo", "paper", "--steps", "19"])
    assert result.exit_code == 2
    assert "--steps" in result.stderr


@pytest.mark.parametrize("name", ["bias", "paper", "convolution"])
def test_each_demonstration_has_help_and_an_example(name):
    result = CliRunner().invoke(batchnorm.cli.main, ["demo", name, "--help"])
    assert result.exit_code == 0
    assert f"Example: batchnorm demo {name} --output demo-output/{name}" in " ".join(result.stdout.split())


def test_an_output_before_the_command_is_refused():
    result = CliRunner().invoke(batchnorm.cli.main, ["demo", "--output", "x", "bias"])
    assert result.exit_code == 2
    assert "--output belongs after the command: bias --output DIR" in result.stderr
