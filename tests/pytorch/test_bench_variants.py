"""The benchmark of networks times what it says: the rest, the comparison of variants, and the rounds."""

from __future__ import annotations

import copy
import gc
import operator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import batchnorm.torch as bt
from bench_network import measure, networks
from bench_network.rows import CHANNELS_LAST, EAGER, EVAL, FUSED, OURS, PYTORCH, QUICK, REST, STEP, Row
from bench_network.variant import WARM, Process, Variant

ROW = Row("tiny", 4, 8)
NAMES = (*EAGER, REST)


class Tiny(nn.Module):
    """Each form of activation and addition that the networks of torchvision have, in branches that meet."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(x))
        y += self.down(x)
        y = self.relu(y)
        y = torch.add(y, self.last(y))
        y = y + x
        return self.head(self.drop(y.mean((2, 3))))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The tiny network stands where torchvision has its own."""
    monkeypatch.setattr(networks.torchvision.models, "tiny", Tiny, raising=False)


def quiet(what):
    pass


def variants(row=ROW, names=NAMES):
    return {name: Variant(row, name) for name in names}


def targets(model):
    return [node.target for node in model.graph.nodes]


def test_the_rest_has_no_batch_norm_relu_or_addition():
    """Its weighted layers are all there, and values and gradients are of a size that is timed as usual."""
    model = networks.original(ROW)
    weighted = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    rest = networks.made(REST, model, ROW)
    assert [name for name, m in rest.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)] == weighted
    assert not [m for m in rest.modules() if isinstance(m, networks.NORMS + networks.ACTIVATIONS)]
    assert not [m for m in rest.modules() if m._forward_hooks]
    assert targets(rest).count(networks.one_of_both) == 3
    assert not {operator.add, operator.iadd, torch.add, functional.relu} & set(targets(rest))

    seen = []
    for name in weighted:
        rest.get_submodule(name).register_forward_hook(lambda m, inputs, y: seen.append(y.detach().std()))
    networks.step(rest.train(), *networks.tensors(ROW))
    torch.testing.assert_close(torch.stack(seen), torch.ones(len(weighted)))
    assert all(float(p.grad.abs().max()) > 0 for p in rest.parameters())


def test_the_rest_leaves_the_network_alone():
    model = networks.original(ROW)
    before = copy.deepcopy(model.state_dict())
    networks.made(REST, model, ROW)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_stands_for_an_addition_passes_its_gradient_to_both():
    one, other = (torch.randn(3, requires_grad=True) for _ in range(2))
    y, dy = networks.one_of_both(one, other), torch.randn(3)
    assert torch.equal(y, one)
    y.backward(dy)
    assert torch.equal(one.grad, dy)
    assert torch.equal(other.grad, dy)


def test_the_original_has_the_statistics_of_its_batch_and_no_dropout():
    """So that the output in eval mode is of an ordinary size; a second making gives the same bits."""
    model = networks.original(ROW)
    assert model.bn1.momentum == 0.1
    assert model.drop.p == 0
    y = model.conv1(networks.tensors(ROW)[0])
    torch.testing.assert_close(model.bn1.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, y.var((0, 2, 3)))
    again = networks.original(ROW).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("memory", ["contiguous", CHANNELS_LAST])
def test_variants_are_what_they_are_called(memory):
    """Layers are PyTorch's or ours, fused or not, from the same weights in memory of their own."""
    row = ROW._replace(memory=memory)
    models = {name: variant.model for name, variant in variants(row).items()}
    layers = {
        name: [type(m) for m in models[name].modules() if isinstance(m, nn.BatchNorm2d)] for name in EAGER
    }
    assert layers[PYTORCH] == [nn.BatchNorm2d] * 4
    assert layers[OURS] == layers[FUSED] == [bt.BatchNorm2d] * 4
    assert type(models[OURS]) is Tiny
    assert type(models[FUSED]) is not Tiny
    last = torch.channels_last if memory == CHANNELS_LAST else torch.contiguous_format
    for name, model in models.items():
        assert model.conv2.weight.is_contiguous(memory_format=last), name
    assert networks.tensors(row)[0].is_contiguous(memory_format=last)
    assert torch.equal(models[OURS].conv1.weight, models[PYTORCH].conv1.weight)
    assert len({model.conv1.weight.data_ptr() for model in models.values()}) == len(models)


def test_variants_that_agree_are_told_and_pass():
    told = []
    measure.compare(variants(), ROW, told.append)
    assert told == [f"comparing {name}" for name in (OURS, FUSED, REST)]


def wrong_loss(model):
    model.head.bias.data[0] += 5


def wrong_gradient(model):
    model.conv1.weight.register_hook(lambda dy: 1.5 * dy)


def no_gradient(model):
    model.conv1.weight.register_hook(lambda dy: dy * float("nan"))


def wrong_output(model):
    model.bn1.running_var *= 2


@pytest.mark.parametrize("name", [OURS, FUSED])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [(wrong_loss, "loss"), (wrong_gradient, "gradient"), (no_gradient, "gradient"), (wrong_output, "output")],
)
def test_a_variant_that_computes_something_else_is_found(spoil, what, name):
    every = variants()
    spoil(every[name].model)
    with pytest.raises(measure.DifferentError, match=f"^{ROW.name}: {what} of {name} is off by "):
        measure.compare(every, ROW, quiet)


@pytest.mark.parametrize(("what", "limit"), [("loss", 1e-3), ("gradient", 5e-2), ("output", 1e-2)])
def test_differences_have_limits(what, limit):
    """Relative ones: of what is 100 everywhere, slightly more or less than the limit is off."""
    full = np.full(9, 100.0)
    answers = {"loss": full[:1], "gradient": [full, full[:1]], "output": full}

    def given(part):
        value = answers[what]
        parts = value if isinstance(value, list) else [value]
        changed = {what: [(1 + part * limit) * each for each in parts]}
        return SimpleNamespace(answers=lambda: answers | changed)

    measure.compare({PYTORCH: given(0), OURS: given(0.9)}, ROW, quiet)
    with pytest.raises(measure.DifferentError, match=f"{what} of {OURS} is off by "):
        measure.compare({PYTORCH: given(0), OURS: given(1.1)}, ROW, quiet)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30, float("inf"), float("nan")])
def test_a_gradient_of_the_rest_that_is_no_ordinary_number_is_found(factor):
    every = variants()
    every[REST].model.conv2.weight.register_hook(lambda dy: factor * dy)
    with pytest.raises(measure.DifferentError, match=f"{REST}: gradient of conv2.weight is "):
        measure.compare(every, ROW, quiet)


@pytest.mark.parametrize("direction", [STEP, EVAL])
def test_every_variant_is_timed_once_a_round_in_changing_order(direction):
    """In the mode of the pass, after untimed calls; no call frees the gradients of the one before."""
    calls = []
    every = variants(names=EAGER)

    def recorded(name, variant, call):
        def made():
            assert variant.model.training == (direction == STEP)
            assert gc.isenabled() == (len(calls) < 3 * WARM)
            assert len(calls) < 3 * WARM or all(p.grad is None for p in variant.model.parameters())
            calls.append(name)
            return call()

        return made

    for name, variant in every.items():
        variant.call = recorded(name, variant, variant.call)
    seconds = measure.rounds_of(every, direction, 8, quiet)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(EAGER, 8)
    assert all(time > 0 for times in seconds.values() for time in times)
    warm, rounds = calls[: 3 * WARM], calls[3 * WARM :]
    assert sorted(warm) == sorted(EAGER * WARM)
    orders = {tuple(rounds[i : i + 3]) for i in range(0, len(rounds), 3)}
    assert all(sorted(order) == sorted(EAGER) for order in orders)
    assert len(rounds) == 24
    assert len(orders) > 1


def test_a_row_is_measured_whole():
    """Both passes are; the profiler sees batch norm in each variant, and less of ReLU where it is fused."""
    lines = measure.timed(variants(), ROW, 2, quiet)
    assert [line["pass"] for line in lines] == [STEP, EVAL]
    assert all(dict.fromkeys(NAMES, 2) == {n: len(s) for n, s in line["seconds"].items()} for line in lines)
    seen = lines[0]["operators"]
    assert tuple(seen) == EAGER
    assert all(seen[name]["batch norm"] > 0 for name in EAGER)
    assert 0 < seen[FUSED]["ReLU"] < seen[OURS]["ReLU"]
    assert seen[PYTORCH]["ReLU"] > 0
    assert all(sum(kinds.values()) <= 2 * kinds["all"] for kinds in seen.values())


def test_a_process_does_what_the_variant_does_here():
    """It computes the same, times its calls, hands errors on, and ends."""
    row, threads = QUICK[0], 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted = Variant(row, FUSED).answers()
    finally:
        torch.set_num_threads(before)
    there = Process(row, FUSED, threads)
    try:
        got = there.answers()
        assert all(measure.apart(got, wanted, what) < 1e-6 for what in wanted)
        assert all(largest > 0 for largest in there.gradients().values())
        there.prepare(EVAL)
        assert there.seconds() > 0
        assert there.profiled()["batch norm"] > 0
        with pytest.raises(RuntimeError, match=f"{row.name}: {FUSED}: .*nothing"):
            there.ask("nothing")
    finally:
        there.close()
    assert there.process.exitcode == 0
