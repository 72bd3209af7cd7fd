"""batchnorm.torch.freeze and recompute_population on whole models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
import batchnorm.torch as bt


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny here, and waiting threads slow down whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5, eps=1e-3, momentum=None),
        nn.ReLU(inplace=True),
    )


@pytest.fixture(params=["plain", "replaced", "fused"])
def model(request):
    made = network()
    if request.param != "plain":
        bt.replace(made, fuse=request.param == "fused")
    return made


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(size, 3, 7, 7) * size + 1 for size in (2, 5, 3)]


def everything(model):
    """All that recompute_population leaves alone, and the statistics."""
    rest = [
        (name, module.training, getattr(module, "track_running_stats", None), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    state = {key: values.clone() for key, values in model.state_dict().items()}
    statistics = {key: state.pop(key) for key in list(state) if "running" in key}
    return rest, state, statistics


def within(inputs):
    """Algorithm 2 with weights by count, in float64, written anew."""
    parts = [x.double().transpose(0, 1).flatten(1) for x in inputs]
    values, batches = sum(x.shape[1] for x in parts), len(parts)
    mean = sum(x.sum(1) for x in parts) / values
    var = sum(((x - x.mean(1, keepdim=True)) ** 2).sum(1) for x in parts) / (values - batches)
    return mean.float(), var.float()


def test_all_layers_in_one_pass(model, batches):
    model.train()
    model[3].eval()
    model[1].eval()
    rest, state, _ = everything(model)
    plain = network()
    assert bt.recompute_population(model, iter(batches)) == ("1", "5")
    inputs = [plain[0](x) for x in batches]
    torch.testing.assert_close((model[1].running_mean, model[1].running_var), within(inputs))
    # In training mode the first layer normalizes by the batch; dropout does nothing.
    inputs = [plain[4](plain[2](plain[1](x))) for x in inputs]
    torch.testing.assert_close((model[5].running_mean, model[5].running_var), within(inputs))
    assert everything(model)[0] == rest
    torch.testing.assert_close(everything(model)[1], state, rtol=0, atol=0)


def test_layer_after_layer(model, batches):
    rest, state, _ = everything(model)
    plain = network().eval()
    assert bt.recompute_population(model, batches, layerwise=True) == ("1", "5")
    inputs = [plain[0](x).detach() for x in batches]
    mean, var = within(inputs)
    torch.testing.assert_close((model[1].running_mean, model[1].running_var), (mean, var))
    plain[1].running_mean, plain[1].running_var = mean, var
    inputs = [plain[4](plain[2](plain[1](x))) for x in inputs]
    torch.testing.assert_close((model[5].running_mean, model[5].running_var), within(inputs))
    assert everything(model)[0] == rest
    torch.testing.assert_close(everything(model)[1], state, rtol=0, atol=0)


def test_batches_with_labels_and_a_forward_of_ones_own(batches):
    models = [network() for _ in range(3)]
    bt.recompute_population(models[0], batches)
    bt.recompute_population(models[1], [(x, "label") for x in batches])
    bt.recompute_population(
        models[2], [{"x": x} for x in batches], forward=lambda model, batch: model(batch["x"])
    )
    for model in models[1:]:
        torch.testing.assert_close(everything(model)[2], everything(models[0])[2], rtol=0, atol=0)


class FailsError(Exception):
    pass


@pytest.mark.parametrize("layerwise", [False, True])
def test_after_an_exception_all_is_as_before(model, batches, layerwise):
    model.train()
    model[5].eval()
    before = everything(model)
    calls = []

    def forward(model, batch):
        calls.append(batch)
        if len(calls) == 6 if layerwise else len(calls) == 2:
            raise FailsError
        return model(batch)

    with pytest.raises(FailsError):
        bt.recompute_population(model, batches, forward=forward, layerwise=layerwise)
    rest, *tensors = everything(model)
    assert rest == before[0]
    torch.testing.assert_close(tensors, list(before[1:]), rtol=0, atol=0)


def test_what_recompute_population_refuses(batches):
    model = network()
    before = everything(model)
    with pytest.raises(ValueError, match="batches: 1 or more wanted, found none"):
        bt.recompute_population(model, [])
    with pytest.raises(TypeError, match="batches: was list_iterator, which can be read only once"):
        bt.recompute_population(model, iter(batches), layerwise=True)
    with pytest.raises(TypeError, match=r"model: was int, wanted a torch\.nn\.Module"):
        bt.recompute_population(3, batches)
    with pytest.raises(ValueError, match="at layer '1': moments: the batch has non-finite statistics"):
        bt.recompute_population(model, [batches[0] * torch.inf])
    with pytest.raises(ValueError, match="at layer '5': moments: the batch has fewer than 2 values"):
        bt.recompute_population(model, [torch.randn(1, 3, 5, 5)])
    with pytest.raises(ValueError, match="layer '0' is a SyncBatchNorm"):
        bt.recompute_population(nn.Sequential(nn.SyncBatchNorm(3)), batches)
    rest, *tensors = everything(model)
    assert rest == before[0]
    torch.testing.assert_close(tensors, list(before[1:]), rtol=0, atol=0)


def test_layers_that_do_not_run_or_have_no_statistics_are_left(batches):
    model = nn.ModuleList(
        [nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)]
    )
    forward = lambda model, x: model[1](model[0](x))  # noqa: E731
    assert bt.recompute_population(model, batches, forward=forward) == ("0",)
    assert model[1].running_mean is None
    assert not model[1].track_running_stats
    assert model[2].running_mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, batches):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(dtype)
    x = [batch.to(dtype) for batch in batches]
    bt.recompute_population(model, x)
    expected = [values.to(dtype) for values in within([batch.float() for batch in x])]
    torch.testing.assert_close([model[0].running_mean, model[0].running_var], expected)


def test_freeze(model, batches):
    bt.recompute_population(model, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    frozen = bt.freeze(model)
    assert list(frozen) == ["1", "5"]
    assert frozen["5"].eps == np.float32(1e-3)
    model.eval()
    for name in ("1", "5"):
        layer = model[int(name)]
        x = torch.randn(2, layer.num_features, 3, 3)
        assert frozen[name].channels == layer.num_features
        torch.testing.assert_close(torch.from_numpy(frozen[name](x.numpy())), layer(x).detach())


def test_freeze_of_other_dtypes_and_without_parameters():
    model = nn.ModuleDict(
        {
            "wide": nn.BatchNorm1d(2, dtype=torch.float64),
            "narrow": nn.BatchNorm1d(2, dtype=torch.bfloat16),
            "bare": nn.BatchNorm1d(2, affine=False),
        }
    )
    model["shared"] = model["bare"]
    frozen = bt.freeze(model)
    assert {name: layer.dtype.name for name, layer in frozen.items()} == {
        "wide": "float64",
        "narrow": "float32",
        "bare": "float32",
    }
    assert frozen["bare"] == bn.FrozenBatchNorm([0, 0], [1, 1])


def test_what_freeze_refuses():
    active = nn.Sequential(nn.BatchNorm1d(2), bt.BatchNorm1d(2, activation="relu"))
    with pytest.raises(ValueError, match="layer '1' applies 'relu', and a frozen layer holds no activation"):
        bt.freeze(active)
    with pytest.raises(ValueError, match="layer '0' has no running statistics"):
        bt.freeze(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)))
    broken = nn.BatchNorm1d(2)
    broken.running_var[1] = -1
    with pytest.raises(ValueError, match="model: the layer: var"):
        bt.freeze(broken)
    with pytest.raises(TypeError, match="model: was dict"):
        bt.freeze({})


def test_a_fused_model_freezes_to_plain_layers_that_stay_plain(batches):
    model = network()
    reference = copy.deepcopy(model)
    _, report = bt.replace(model)
    assert report.fused == {"1": "relu", "5": "relu"}
    assert bt.freeze(model) == bt.freeze(reference)
