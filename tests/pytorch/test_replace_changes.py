"""Fused modules when they, their parts or their arguments are not what they were or usually are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from replace_cases import Base, assert_same, one_thread_in_float64  # noqa: F401
from torch import nn
from torch.nn import functional

import batchnorm.torch as bt


class Configured(Base):
    def __init__(self):
        super().__init__()
        self.active, self.down = True, None
        self.extra = nn.ModuleList()

    def forward(self, x, *, scale=None):
        y = self.bn(self.conv(x))
        if self.down is not None:
            x = self.down(x)
        y = y + x
        y = self.relu(y) if self.active else y
        for part in self.extra:
            y = part(y)
        return y if scale is None else y * scale


class Negative(bt.BatchNorm2d):
    def forward(self, input, residual=None):
        return -super().forward(input, residual)


def changes(model):
    yield "another value", lambda: setattr(model, "active", False)
    yield "a module where there was None", lambda: setattr(model, "down", nn.Conv2d(3, 3, 1))
    yield "a longer list", lambda: model.extra.append(nn.Tanh())
    yield "another activation", lambda: setattr(model, "relu", nn.Tanh())
    yield "PyTorch's layer", lambda: setattr(model, "bn", nn.BatchNorm2d(3))
    yield "no layer", lambda: setattr(model, "bn", nn.Identity())
    yield "a subclass of ours", lambda: setattr(model, "bn", Negative(3))


@pytest.mark.parametrize("index", range(7), ids=[name for name, _ in changes(None)])
def test_a_model_that_is_changed_afterwards_does_what_it_says(index):
    torch.manual_seed(0)
    model = Configured()
    reference = copy.deepcopy(model)
    assert bt.replace(model)[1].fused == {"bn": "residual, relu"}
    x = torch.randn(4, 3, 5, 5)
    assert_same(model, reference, x)
    for each in (model, reference):
        torch.manual_seed(0)
        list(changes(each))[index][1]()
    assert_same(model, reference, x)


def test_optional_and_keyword_arguments_reach_the_original_forward():
    torch.manual_seed(0)
    model = Configured()
    reference = copy.deepcopy(model)
    bt.replace(model)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x, scale=3), reference(x, scale=3))
    torch.testing.assert_close(model(x=x), reference(x=x))
    with pytest.raises(TypeError):
        model()


class ByType(Base):
    def forward(self, x):
        x = torch.cat(x, 1) if isinstance(x, list) else x
        return self.relu(self.bn(x))


def test_each_type_of_argument_has_its_own_recording():
    torch.manual_seed(0)
    model = ByType()
    reference = copy.deepcopy(model)
    assert bt.replace(model)[1].fused == {"bn": "relu"}
    x = torch.randn(4, 3, 5, 5)
    for argument in (x, [x[:, :1], x[:, 1:]]):
        torch.testing.assert_close(model(argument), reference(argument))
    with pytest.raises(AttributeError, match="'tuple' object"):
        model((x[:, :1], x[:, 1:]))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 5, 5), (4, 3, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_that_is_broadcast_or_promoted(shape, dtype):
    class Adds(Base):
        def forward(self, x, r):
            return self.relu(self.bn(x) + r)

    torch.manual_seed(0)
    model = Adds().float()
    reference = copy.deepcopy(model)
    assert bt.replace(model)[1].fused == {"bn": "residual, relu"}
    x, r = torch.randn(4, 3, 5, 5, dtype=torch.float32), torch.randn(shape, dtype=dtype)
    y = reference(x, r)
    torch.testing.assert_close(model(x, r), y, rtol=1e-5, atol=1e-6)
    assert model(x, r).dtype == y.dtype


def test_a_residual_that_is_changed_later_keeps_its_gradient():
    class Changes(Base):
        def forward(self, x):
            r = self.conv(x)
            y = self.relu(self.bn(x) + r)
            return functional.relu(r, inplace=True) + y

    torch.manual_seed(0)
    model = Changes()
    reference = copy.deepcopy(model)
    assert bt.replace(model)[1].fused == {"bn": "residual"}
    assert_same(model, reference, torch.randn(4, 3, 5, 5))


def test_dropout_in_a_fused_module_is_that_of_its_mode():
    class Drops(Base):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.relu(self.bn(x)))

    torch.manual_seed(0)
    model = Drops()
    reference = copy.deepcopy(model)
    assert bt.replace(model)[1].fused == {"bn": "relu"}
    assert_same(model, reference, torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("part", ["bn", "relu"])
@pytest.mark.parametrize("sequential", [True, False])
def test_hooks_see_what_they_saw(part, sequential):
    class Calls(Base):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)))

    torch.manual_seed(0)
    parts = Base()
    model = nn.Sequential()
    model.conv, model.bn, model.relu = parts.conv, parts.bn, parts.relu
    model = model if sequential else Calls()
    reference = copy.deepcopy(model)
    assert bt.replace(model)[1].fused == {"bn": "relu"}
    seen = []
    handles = [
        getattr(each, part).register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
        for each in (model, reference)
    ]
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x), reference(x))
    assert len(seen) == 2
    torch.testing.assert_close(*seen)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(x), reference(x))
    assert len(seen) == 2


@pytest.mark.parametrize("part", [1, 2])
def test_parts_with_hooks_are_left(part):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model[part].register_forward_hook(lambda *_: None)
    _, report = bt.replace(model)
    assert "has hooks" in report["1"].reason
    assert not report["1"].fused


def test_parts_taken_out_of_a_sequential_are_plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    reference = copy.deepcopy(model)
    bt.replace(model)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model[1](model[0](x)), reference[1](reference[0](x)))
    torch.testing.assert_close(model[:2](x), reference[:2](x))
    torch.testing.assert_close(list(model)[1](x), list(reference)[1](x))
    fused = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(x), reference[:2](x))
    assert fused(x).min() < 0


def test_a_shared_layer_stays_one_object():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(bn, nn.ReLU()), nn.Sequential(nn.Conv2d(3, 3, 1), bn, nn.ReLU()))
    reference = copy.deepcopy(model)
    _, report = bt.replace(model)
    assert model[0][0] is model[1][1] is bn
    assert type(bn) is bt.BatchNorm2d
    assert len(report) == 1
    assert "under 2 names" in report["0.0"].reason
    assert_same(model, reference, torch.randn(4, 3, 5, 5))


def test_a_class_that_counts_its_subclasses_gets_none():
    seen = []

    class Registers(Base):
        def __init_subclass__(cls):
            seen.append(cls)

        def forward(self, x):
            return self.relu(self.bn(x))

    _, report = bt.replace(Registers())
    assert "counts subclasses" in report["bn"].reason
    assert not seen


def test_a_patched_forward_is_left():
    model = ByType()
    model.forward = lambda x: model.bn(x)
    _, report = bt.replace(model)
    assert "patched" in report["bn"].reason
    x = torch.randn(4, 3, 5, 5)
    assert model(x).min() < 0


def test_methods_are_part_of_a_forward():
    class Calls(Base):
        @staticmethod
        def twice(y):
            return y * 2

        @property
        def slope(self):
            return self.bn.eps

        def inner(self, x):
            return functional.relu(self.bn(x))

        def forward(self, x):
            return self.twice(self.inner(x)) * self.slope

    model = Calls()
    reference = copy.deepcopy(model)
    assert bt.replace(model)[1].fused == {"bn": "relu"}
    x = torch.randn(4, 3, 5, 5)
    for eps in (1e-5, 1e-3):
        model.bn.eps = reference.bn.eps = eps
        assert_same(model, reference, x)


def test_checkpoints_of_a_densenet_are_kept():
    block = torchvision.models.densenet._DenseBlock(2, 4, 2, 2, 0, memory_efficient=True)
    reference = copy.deepcopy(block)
    _, report = bt.replace(block)
    assert not report.fused
    assert_same(block, reference, torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize("sequential", [True, False])
def test_global_hooks_see_every_part(sequential):
    class Calls(Base):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)))

    parts = Base()
    model = nn.Sequential(parts.conv, parts.bn, parts.relu) if sequential else Calls()
    reference = copy.deepcopy(model)
    assert list(bt.replace(model)[1].fused.values()) == ["relu"]
    x = torch.randn(4, 3, 5, 5)
    seen = {model: [], reference: []}
    for each, outputs in seen.items():
        handle = nn.modules.module.register_module_forward_hook(
            lambda _, args, y, to=outputs: to.append(y.clone())
        )
        each(x)
        handle.remove()
    assert len(seen[model]) == 4
    torch.testing.assert_close(seen[model], seen[reference])


class Odd(Base):
    """Constants of many types in a forward, and a view of a list of results."""

    def forward(self, x, y):
        z = x.to(torch.float64, memory_format=torch.channels_last)
        z = z[:, [2, 0, 1], ..., 1:].clamp(-float("inf"), 3)
        z = z + torch.zeros_like(z[:, :1], dtype=torch.float64, device=torch.device("cpu"))
        first, second = self.relu(self.bn(z)).split([1, 2], dim=1)
        return {"first": first, "all": torch.cat([second * y[..., :1], first], dim=1)}["all"]


def test_odd_arguments_survive_recording_and_pickling():
    torch.manual_seed(0)
    model = Odd()
    reference = copy.deepcopy(model)
    _, report = bt.replace(model)
    assert report.fused == {"bn": "relu"}, str(report)
    x, y = torch.randn(4, 3, 5, 5), torch.randn(4, 1, 5, 4)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(each(x, y), reference.train()(x, y))


def test_of_two_layers_that_are_added_one_makes_the_addition():
    class Both(Base):
        def __init__(self):
            super().__init__()
            self.other = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            return self.relu(self.bn(x) + self.other(x))

    torch.manual_seed(0)
    model = Both()
    reference = copy.deepcopy(model)
    _, report = bt.replace(model)
    assert report.fused == {"other.1": "residual, relu"}
    assert report["bn"].reason == "the layer that it is added to makes the addition"
    assert_same(model, reference, torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, bt.SyncBatchNorm])
def test_synchronized_layers_take_the_place_of_fused_ones(cls):
    """They are called by their own forward; without processes ours computes what the others did."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    reference = copy.deepcopy(model)
    bt.replace(model)
    model = cls.convert_sync_batchnorm(model)
    assert type(model[1]) is cls
    assert getattr(model[1], "activation", None) is None
    x = torch.randn(4, 3, 5, 5)
    if cls is bt.SyncBatchNorm:
        assert_same(model, reference, x)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))
