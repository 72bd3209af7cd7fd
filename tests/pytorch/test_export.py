"""Scripting, tracing and exporting record PyTorch's operator, so that programs need nothing of ours."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import fx, nn

import batchnorm.torch as bt

MODES = pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
ACTIVATION = pytest.mark.parametrize("activation", [None, "relu", "relu6"], ids=str)


class Network(nn.Module):
    """A convolution, a batch norm and what may follow it, of ours or of PyTorch."""

    def __init__(self, ours, activation, **kwargs):
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, padding=1)
        if ours:
            self.norm = bt.BatchNorm2d(3, activation=activation, **kwargs)
            self.activation = nn.Identity()
        else:
            self.norm = nn.BatchNorm2d(3, **kwargs)
            self.activation = {None: nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}[activation]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.convolution(x)))


class Residual(nn.Module):
    """A layer of ours that takes a residual."""

    def __init__(self, activation=None):
        super().__init__()
        self.norm = bt.BatchNorm2d(2, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, x)


@pytest.fixture
def x():
    return torch.randn(4, 2, 5, 5)


def networks(activation, training, **kwargs):
    """The same network with a layer of ours and with PyTorch's."""
    ours, theirs = Network(True, activation, **kwargs), Network(False, activation, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


@ACTIVATION
@MODES
@pytest.mark.parametrize("strict", [True, False], ids=("strict", "not strict"))
def test_export(activation, training, strict, x):
    ours, theirs = networks(activation, training)
    programs = [torch.export.export(network, (x,), strict=strict) for network in (ours, theirs)]
    assert str(programs[0].graph) == str(programs[1].graph)
    assert ours.norm.num_batches_tracked == 0


def test_an_exported_program_with_a_residual(x):
    program = torch.export.export(Residual("relu"), (x,))
    assert "batchnorm" not in str(program.graph).replace("batch_norm", "")
    torch.testing.assert_close(program.module()(x), Residual("relu")(x))


def graph_of(file):
    """An ONNX graph without names, which come from modules, and what else tells where nodes come from."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load_from_string(file.getvalue()).graph
    names: dict[str, str] = {"": ""}

    def renamed(name):
        return names.setdefault(name, f"v{len(names)}")

    for value in (*graph.input, *graph.initializer):
        value.name = renamed(value.name)
    for node in graph.node:
        node.name = renamed(node.name)
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*graph.output, *graph.value_info):
        value.name = renamed(value.name)
        value.ClearField("metadata_props")
    return graph


@pytest.mark.parametrize("activation", [None, "relu6"], ids=str)
@MODES
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=("dynamo", "torchscript"))
def test_onnx(activation, training, dynamo, x):
    graphs = []
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    arguments = {} if dynamo else {"training": mode, "do_constant_folding": False}
    for network in networks(activation, training):
        torch.manual_seed(0)
        network.convolution.reset_parameters()
        file = io.BytesIO()
        torch.onnx.export(network, (x,), file, dynamo=dynamo, verbose=False, **arguments)
        graphs.append(graph_of(file))
    assert graphs[0] == graphs[1]


@ACTIVATION
@MODES
@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"affine": False}], ids=str)
def test_script(activation, training, arguments, x):
    ours, theirs = networks(activation, training, **arguments)
    scripted = torch.jit.script(ours)
    assert "batchnorm::" not in str(scripted.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(2):
        assert torch.equal(loaded(x), theirs(x))
    torch.testing.assert_close(loaded.state_dict(), theirs.state_dict())


def test_script_with_a_residual(x):
    network = Residual("relu")
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(network))(x), network(x))


def test_script_without_tracked_statistics(x):
    ours, theirs = networks(None, False, track_running_stats=False)
    assert torch.equal(torch.jit.script(ours)(x), theirs(x))


@pytest.mark.parametrize("layer", [bt.BatchNorm1d, bt.BatchNorm3d])
def test_script_of_other_ranks(layer):
    x = torch.randn(2, 3, 4, 4, 4)[..., 0, 0] if layer is bt.BatchNorm1d else torch.randn(2, 3, 4, 4, 4)
    one = layer(3)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(one))(x), one(x))
    with pytest.raises(Exception, match=r"expected .*D"):
        torch.jit.script(one)(torch.ones(2, 3, 4, 4))


def kinds(traced):
    """The operators of a traced graph, in order."""
    return [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("aten")]


@ACTIVATION
@MODES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace(activation, training, x):
    ours, theirs = networks(activation, training)
    traced = [torch.jit.trace(network, x, check_trace=False) for network in (ours, theirs)]
    assert kinds(traced[0]) == kinds(traced[1])
    assert torch.equal(traced[0](x), traced[1](x))


@ACTIVATION
@MODES
def test_fx(activation, training, x):
    """fx looks into our layer; what it records does what PyTorch's layer does, the count included."""
    ours, theirs = networks(activation, training)
    traced = fx.symbolic_trace(ours)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets[0] is nn.functional.batch_norm
    assert all(target.__module__.startswith("torch") for target in targets)
    assert ours.norm.num_batches_tracked == 0  # tracing does not count
    for _ in range(2):
        assert torch.equal(traced(x), theirs(x))
    recorded = traced.state_dict()
    assert ("norm.num_batches_tracked" in recorded) == training
    torch.testing.assert_close(recorded, {name: theirs.state_dict()[name] for name in recorded})


def test_fx_with_a_cumulative_average(x):
    ours, theirs = networks(None, True, momentum=None)
    traced = fx.symbolic_trace(ours)
    for _ in range(3):
        assert torch.equal(traced(x), theirs(x))
    torch.testing.assert_close(traced.state_dict(), theirs.state_dict())


def test_fx_with_a_residual(x):
    traced = fx.symbolic_trace(Residual("relu6"))
    torch.testing.assert_close(traced(x), Residual("relu6")(x))


@MODES
def test_dispatch_modes(training):
    """Modes that see operators see PyTorch's."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **kwargs or {})

    layer = bt.BatchNorm2d(2, activation="relu").train(training)
    with Recorder() as recorder:
        layer(torch.randn(4, 2, 5, 5))
    assert any(name.startswith("aten::") and "batch_norm" in name for name in recorder.names)
    assert not any(name.startswith("batchnorm::") for name in recorder.names)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.randn(4, 2, 5, 5)))
    assert y.shape == (4, 2, 5, 5)


@MODES
def test_meta(training):
    layer = bt.BatchNorm2d(2, device="meta", activation="relu").train(training)
    y = layer(torch.empty(4, 2, 5, 5, device="meta"))
    assert y.is_meta
    assert y.shape == (4, 2, 5, 5)


def test_subclasses(x):
    class Logged(torch.Tensor):
        names = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.names.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    y = bt.BatchNorm2d(2)(x.as_subclass(Logged))
    assert type(y) is Logged
    assert "batch_norm" in Logged.names
