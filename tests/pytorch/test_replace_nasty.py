"""What must not be fused is not, for the reason that the report gives, and results stay the original's."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from replace_cases import Base, assert_same, one_thread_in_float64  # noqa: F401
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bt

FLAG = True


class UsedTwice(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) + y


class CalledTwice(Base):
    def forward(self, x):
        return self.relu(self.bn(self.relu(self.bn(x))))


class ReadsTraining(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if self.training else y


class ReadsTrainingByDict(Base):
    def forward(self, x):
        return self.relu(self.bn(x)) if self.bn.__dict__["training"] else self.bn(x)


class ReadsModeOfAPart(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if self.bn.training else y


class Counts(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.bn(x)
        return self.relu(y) if self.calls % 2 else y


class CountsInAList(Base):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        return self.relu(self.bn(x)) * len(self.calls)


class CountsInABuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.relu(self.bn(x)) * self.calls


class ReadsAGlobal(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if FLAG else y


def helper(y):
    return functional.relu(y) if FLAG else y


class ReadsAGlobalElsewhere(Base):
    def forward(self, x):
        return helper(self.bn(x))


class DrawsPython(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if random.random() < 0.5 else y


class DrawsTorch(Base):
    def forward(self, x):
        return self.relu(self.bn(x)) * torch.rand(1)


class DrawsTorchToDecide(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if torch.rand(()) < 0.5 else y


class Checkpoints(Base):
    def inner(self, x):
        return self.relu(self.bn(x))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class CallsItsModules(Base):
    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


class DependsOnData(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if x.mean() > 0 else y


class AsksAType(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if isinstance(y, torch.Tensor) else y


class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            y = self.relu(self.bn(x))
        return y * 2


class AddsInPlaceToX(Base):
    def forward(self, x):
        z = x * 1
        z += self.bn(x)
        return self.relu(z) + z


class AddsScaled(Base):
    def forward(self, x):
        return torch.add(self.bn(x), x, alpha=2)


class AddsANumber(Base):
    def forward(self, x):
        return self.bn(x) + 1


class AddsItself(Base):
    def forward(self, x):
        y = self.bn(x)
        return y + y


class Unused(Base):
    def forward(self, x):
        self.bn(x)
        return self.relu(x)


class ChangedBetween(Base):
    def forward(self, x):
        z = x * 1
        y = self.bn(z)
        r = functional.relu(x * 2, inplace=True)
        return y + r


class TwoArguments(Base):
    def forward(self, x):
        return self.relu(self.bn(*(x,))) + self.bn(x)


REFUSED = {
    UsedTwice: "another consumer",
    CalledTwice: "called more than once",
    ReadsTraining: "reads self.training",
    ReadsTrainingByDict: "reads __dict__",
    ReadsModeOfAPart: "reads self.training",
    Counts: "writes self.calls",
    CountsInAList: "reads self.calls",
    ReadsAGlobal: "reads FLAG",
    ReadsAGlobalElsewhere: "reads FLAG",
    DrawsPython: "reads random",
    DrawsTorch: "makes tensors",
    DrawsTorchToDecide: "draws random numbers",
    Checkpoints: "forward of Checkpoints",
    CallsItsModules: "calls self.children",
    DependsOnData: "control flow",
    AsksAType: "asks for the type",
    NoGrad: "mode of autograd",
    AddsInPlaceToX: "in place to another tensor",
    AddsScaled: "not a tensor alone",
    AddsANumber: "not a tensor alone",
    AddsItself: "added to itself",
    Unused: "not used",
    ChangedBetween: "changed in place",
    TwoArguments: "called more than once",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_it_is_refused_and_says_why(make):
    torch.manual_seed(0)
    model = make()
    reference = copy.deepcopy(model)
    states = random.getstate(), torch.get_rng_state()
    _, report = bt.replace(model)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert report["bn"].replaced
    assert not report["bn"].fused
    assert REFUSED[make] in report["bn"].reason
    assert type(model) is make
    if make is not NoGrad:
        assert_same(model, reference, torch.randn(4, 3, 5, 5))
    for name, value in vars(reference).items():
        if isinstance(value, int | list):
            assert getattr(model, name) == value


def test_a_counter_in_a_buffer_goes_on_counting():
    torch.manual_seed(0)
    model = CountsInABuffer()
    reference = copy.deepcopy(model)
    _, report = bt.replace(model)
    assert report.fused == {"bn": "relu"}
    assert model.calls == 0
    assert_same(model, reference, torch.randn(4, 3, 5, 5))
    assert model.calls == 4
