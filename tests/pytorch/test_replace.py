"""batchnorm.torch.replace and restore on whole networks."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections import Counter

import pytest
import torch
import torchvision
from replace_cases import assert_same, one_thread_in_float64  # noqa: F401
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

import batchnorm.torch as bt


class Small(nn.Module):
    """All forms that are fused, in a network that takes milliseconds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
        down = nn.Sequential(nn.Conv2d(4, 16, 1, 2), nn.BatchNorm2d(16))
        self.blocks = nn.Sequential(BasicBlock(4, 4), Bottleneck(4, 4, 2, down), nn.BatchNorm2d(16))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 2)
        self.last = nn.BatchNorm1d(2, affine=False)

    def forward(self, x):
        x = functional.relu(self.blocks(self.stem(x)), inplace=True)
        return self.last(self.head(self.drop(x.mean((2, 3)))))


SMALL = {
    "stem.1": "relu6",
    "blocks.0.bn1": "relu",
    "blocks.0.bn2": "residual, relu",
    "blocks.1.bn1": "relu",
    "blocks.1.bn2": "relu",
    "blocks.1.bn3": "residual, relu",
    "blocks.2": "relu",
}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small(), torch.randn(4, 3, 9, 9)


@pytest.mark.parametrize(
    ("name", "size", "fused", "options"),
    [
        ("resnet18", 33, {"relu": 9, "residual, relu": 8}, {}),
        ("resnet50", 33, {"relu": 33, "residual, relu": 16}, {}),
        ("densenet121", 33, {"relu": 121}, {}),
        ("mobilenet_v2", 33, {"relu6": 35, "residual": 10}, {}),
        ("efficientnet_b0", 33, {}, {}),
        ("googlenet", 65, {"relu": 59}, {"init_weights": False}),
        ("inception_v3", 75, {"relu": 94}, {"init_weights": False, "aux_logits": False}),
        ("shufflenet_v2_x0_5", 33, {"relu": 37}, {}),
        ("regnet_y_400mf", 33, {"relu": 33, "residual, relu": 16}, {}),
    ],
)
def test_networks_of_torchvision(name, size, fused, options):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, **options)
    reference = copy.deepcopy(model)
    keys = list(model.state_dict())
    same, report = bt.replace(model)
    assert same is model
    assert list(model.state_dict()) == keys
    assert len(report.replaced) == len(report) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert Counter(report.fused.values()) == fused
    assert all(bool(layer.reason) != bool(layer.fused) for layer in report)
    x = torch.randn(2, 3, size, size)
    for mode in (False, True):
        model.train(mode), reference.train(mode)
        outputs = []
        for each in (model, reference):
            torch.manual_seed(1)
            y = each(x)
            outputs.append(y[0] if isinstance(y, tuple) else y)
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fuse", [True, False])
def test_results_and_gradients(small, fuse):
    model, x = small
    reference = copy.deepcopy(model)
    _, report = bt.replace(model, fuse=fuse)
    assert report.fused == (SMALL if fuse else {})
    assert_same(model, reference, x)


def test_channels_last_and_autocast(small):
    model, x = small
    model, x = model.float().eval(), x.float().to(memory_format=torch.channels_last)
    reference = copy.deepcopy(model)
    bt.replace(model)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = reference(x)
        torch.testing.assert_close(model(x), y, rtol=0.1, atol=0.1)
        assert model(x).dtype == y.dtype


def test_everything_else_stays(small):
    model, _ = small
    model.blocks[0].bn1.weight.requires_grad_(False)
    model.blocks[1].eval()
    handle = model.last.register_forward_hook(lambda *_: None)
    modules = list(model.named_modules())
    parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
    modes = [module.training for module in model.modules()]
    signature = inspect.signature(model.forward)
    bt.replace(model)
    for before, after in zip(modules, model.named_modules(), strict=True):
        assert before[0] == after[0]
        assert before[1] is after[1]
    for before, after in zip(
        parameters + buffers, [*model.named_parameters(), *model.named_buffers()], strict=True
    ):
        assert before[0] == after[0]
        assert before[1] is after[1]
    assert modes == [module.training for module in model.modules()]
    assert not model.blocks[0].bn1.weight.requires_grad
    assert list(model.last._forward_hooks) == [handle.id]
    assert inspect.signature(model.forward) == signature
    assert isinstance(model.blocks[0], BasicBlock)
    assert repr(model) == repr(Small())


def test_restore_gives_everything_back(small):
    model, x = small
    reference = copy.deepcopy(model)
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    bt.replace(model)
    assert type(model.last) is bt.BatchNorm1d
    assert bt.restore(model) is model
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert_same(model, reference, x)


def test_replace_again_changes_nothing_or_the_fusion(small):
    model, x = small
    reference = copy.deepcopy(model)
    bt.replace(model)
    _, again = bt.replace(model)
    assert again.fused == SMALL
    _, plain = bt.replace(model, fuse=False)
    assert not plain.fused
    assert type(model) is Small
    assert_same(model, reference, x)


def test_copies_and_pickles_are_fused_and_independent(small):
    model, x = small
    reference = copy.deepcopy(model)
    bt.replace(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for each in copies:
        assert type(each.blocks[0]) is type(model.blocks[0])
        _, report = bt.replace(copy.deepcopy(each))
        assert report.fused == SMALL
        assert_same(each, copy.deepcopy(reference), x)
        bt.restore(each)
        assert type(each) is Small


def test_states_load_both_ways(small):
    model, x = small
    reference = copy.deepcopy(model)
    bt.replace(model)
    model(x)
    reference.load_state_dict(model.state_dict())
    model.load_state_dict(reference.state_dict())
    assert_same(model, reference, x)


@pytest.mark.filterwarnings("ignore")
def test_it_compiles_whole(small):
    model, x = small
    reference = copy.deepcopy(model)
    bt.replace(model)
    for each in (model, reference):
        each.drop.p = 0.0
    assert_same(torch.compile(model, fullgraph=True, backend="aot_eager"), reference, x)


def test_a_single_batch_norm_is_a_model():
    bn = nn.BatchNorm1d(3)
    same, report = bt.replace(bn)
    assert same is bn
    assert type(bn) is bt.BatchNorm1d
    assert report.replaced == ("",)
    assert type(bt.restore(bn)) is nn.BatchNorm1d


class Own(nn.BatchNorm2d):
    pass


def test_other_types_are_left_and_reported():
    parametrized = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    patched = nn.BatchNorm2d(3)
    patched.forward = lambda x: x
    left = {
        "own": (Own(3), "not exactly"),
        "lazy": (nn.LazyBatchNorm2d(), "lazy"),
        "parametrized": (parametrized, "parametrized"),
        "sync": (nn.SyncBatchNorm(3), "not exactly"),
        "patched": (patched, "patched"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in left.items()} | {"plain": nn.BatchNorm3d(3)})
    types = {name: type(module) for name, module in model.items()}
    _, report = bt.replace(model)
    assert report.replaced == ("plain",)
    for name, (module, reason) in left.items():
        assert type(module) is types[name]
        assert reason in report[name].reason
        assert f"{name} ({types[name].__name__}): left as it is: " in str(report)
    assert "plain (BatchNorm3d): replaced" in str(report)
    assert str(report).startswith("6 batch norms, 1 replaced, 0 of them fused\n")
    with pytest.raises(KeyError):
        report["absent"]


def test_layers_of_ours_keep_their_activation():
    model = nn.Sequential(bt.BatchNorm2d(3, activation="relu6"), nn.ReLU(), nn.BatchNorm2d(3))
    _, report = bt.replace(model)
    assert "has an activation already" in report["0"].reason
    assert model[0].activation == "relu6"
    with pytest.raises(ValueError, match=r"have: 0$"):
        bt.restore(model)
    assert type(model[2]) is bt.BatchNorm2d


def test_what_is_no_model_is_refused():
    for function in (bt.replace, bt.restore):
        with pytest.raises(TypeError, match=r"model: was dict, wanted a torch\.nn\.Module"):
            function({})


def test_functions_and_methods_of_relu():
    calls = [
        functional.relu,
        torch.relu,
        torch.relu_,
        functional.relu_,
        lambda y: y.relu(),
        lambda y: y.relu_(),
        lambda y: functional.relu(y, inplace=True),
        lambda y: functional.relu(y, True),
    ]
    additions = [
        lambda y, r: y + r,
        lambda y, r: r + y,
        lambda y, r: y.add(r),
        lambda y, r: y.add_(r),
        torch.add,
        lambda y, r: torch.add(r, y),
    ]

    for relu in calls:
        for add in additions:

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.a, self.b, self.c = (nn.BatchNorm1d(3) for _ in range(3))

                def forward(self, x, relu=relu, add=add):
                    return relu(add(self.b(relu(self.a(x))), x)) + add(self.c(x), x * 2)

            model = Net()
            reference = copy.deepcopy(model)
            _, report = bt.replace(model)
            assert report.fused == {"a": "relu", "b": "residual, relu", "c": "residual"}, str(report)
            x = torch.randn(5, 3)
            torch.testing.assert_close(model(x), reference(x))


def test_what_pytorch_records_of_a_fused_model_is_the_plain_model(small):
    """fx and scripts read the modules, traces and exported programs hold PyTorch's operators."""
    model, x = small
    plain = bt.replace(copy.deepcopy(model), fuse=False)[0].eval()
    reference = model.eval()
    model = bt.replace(copy.deepcopy(model))[0].eval()
    expected = reference(x)
    assert str(torch.fx.symbolic_trace(model).graph) == str(torch.fx.symbolic_trace(plain).graph)
    made = {
        "trace": torch.jit.trace(model, (x,)),
        "export": torch.export.export(model, (x,)).module(),
        "script": torch.jit.script(model),
    }
    for name, program in made.items():
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4, msg=name)
        assert "batchnorm::" not in str(getattr(program, "graph", ""))
