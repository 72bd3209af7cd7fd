"""SyncBatchNorm in 2 and 4 real processes, over gloo. Judge is PyTorch in float64 on the whole batch."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import sync_ranks
import torch
from sync_ranks import CASES, SECONDS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

OURS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
PYTORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

only_2 = pytest.mark.parametrize("seen", [2], indirect=True)
only_4 = pytest.mark.parametrize("seen", [4], indirect=True)


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def seen(request, tmp_path_factory):
    """What each rank saw, by scenario."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    # Ranks are forked from a server without threads that imports PyTorch once (and Dynamo, as DDP does).
    torch.multiprocessing.set_forkserver_preload(["batchnorm.torch", "torch._dynamo"])
    torch.multiprocessing.start_processes(
        sync_ranks.run, (ranks, str(folder)), ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


class Judge(nn.Module):
    """PyTorch's layer in float64, with the epilogue after it."""

    def __init__(self, case):
        super().__init__()
        arguments = {name: value for name, value in case.layer.items() if name != "activation"}
        layer = sync_ranks.parameters(PYTORCHS[len(case.shape)](case.shape[1], **arguments))
        self.layer, self.activation = layer.double(), case.layer.get("activation")

    def forward(self, x, residual=None):
        y = self.layer(x)
        y = y if residual is None else y + residual
        return {"relu": torch.relu, "relu6": nn.functional.relu6, None: lambda y: y}[self.activation](y)


def judged(case):
    """What the judge gives for all steps of a case; its names as those of a layer."""
    seen = sync_ranks.steps(Judge(case), case, slice(None), wide=True)
    return {name.replace("layer.", ""): value for name, value in seen.items()}


def ulps(seen, wanted, at_least=0.0):
    """The largest difference in units in the last place of seen's dtype at wanted."""
    size = wanted.abs().clamp(min=max(at_least, torch.finfo(seen.dtype).tiny)).to(torch.float64)
    ulp = torch.finfo(seen.dtype).eps * torch.exp2(torch.floor(torch.log2(size)))
    return ((seen.double() - wanted.double()).abs() / ulp).max().item()


def together(shares, name):
    """A tensor of all ranks' rows."""
    return torch.cat([part[name] for part in shares])


@pytest.mark.parametrize("name", CASES)
def test_ranks_give_what_one_process_gives(seen, name):
    case, shares = CASES[name], [rank["cases"][name] for rank in seen]
    wanted = judged(case)
    one = sync_ranks.steps(
        sync_ranks.parameters(OURS[len(case.shape)](case.shape[1], **case.layer)), case, slice(None)
    )
    assert wanted.keys() == one.keys() == shares[0].keys()
    narrow = case.dtype.itemsize == 2
    for key in {"y", "dx", "dresidual"} & one.keys():
        whole = together(shares, key)
        assert whole.dtype == case.dtype
        if case.dtype == torch.float64:
            torch.testing.assert_close(whole, wanted[key], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(whole, one[key], rtol=1e-12, atol=1e-13)
        else:  # 16-bit tensors are normalized in float32
            assert ulps(whole, wanted[key], at_least=narrow) <= 1
            assert ulps(whole, one[key], at_least=narrow) <= 1
    for key in {"dweight", "dbias"} & one.keys():
        whole = sum(part[key].double() for part in shares)
        rtol = {2: 3e-2, 4: 1e-6, 8: 1e-13}[case.parameters.itemsize]
        torch.testing.assert_close(whole, wanted[key], rtol=rtol, atol=10 * rtol)
        assert all(part[key].dtype == case.parameters for part in shares)
    for key in {"running_mean", "running_var"} & one.keys():
        for part in shares:
            assert part[key].dtype == case.parameters
            assert torch.equal(part[key], shares[0][key])  # the same bits
            if case.parameters != torch.float64:
                assert ulps(part[key], wanted[key]) <= case.steps
                assert ulps(part[key], one[key]) <= case.steps
    if "num_batches_tracked" in one:
        assert all(part["num_batches_tracked"] == case.steps for part in shares)


@pytest.mark.parametrize("name", CASES)
def test_memory_order_is_kept(seen, name):
    for rank in seen:
        part = rank["cases"][name]
        for key in {"y", "dx", "dresidual"} & part.keys():
            assert part[key].is_contiguous(memory_format=CASES[name].memory)


@pytest.mark.parametrize("name", ["float64", "float64, empty"])
def test_merged_statistics_are_exact_to_1e_14(seen, name):
    x = np.moveaxis(sync_ranks.batch(CASES[name], 0)[0].numpy().astype(np.longdouble), 1, 0).reshape(5, -1)
    for rank in seen:
        part = rank["cases"][name]
        for key, wanted in ("running_mean", x.mean(1)), ("running_var", x.var(1, ddof=1)):
            assert (abs(part[key].numpy() / wanted - 1) <= 1e-14).all()


def test_parameter_gradients_are_those_of_the_ranks_share(seen):
    case = CASES["unequal"]
    x, _, dy = (t.double() for t in sync_ranks.batch(case, 0))
    dims = (0, 2, 3)
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    normalized = (x - mean) / torch.sqrt(var + 1e-5)
    for r, rank in enumerate(seen):
        rows, part = sync_ranks.share(case, r, len(seen)), rank["cases"]["unequal"]
        for key, wanted in ("dbias", dy[rows].sum(dims)), ("dweight", (dy * normalized)[rows].sum(dims)):
            torch.testing.assert_close(part[key].double(), wanted, rtol=1e-6, atol=1e-6)


def test_24_bytes_a_channel_to_each_other_rank_each_way(seen):
    for rank in seen:
        sent = rank["sent"]
        table = 24 * sync_ranks.WIDTH * (len(seen) - 1)
        for written in (*sent["training"], sent["first layer"][0], sent["no_grad"][0]):
            assert table <= written <= table + 2000  # with headers
        silent = [part for name in ("group of one", "eval", "eval without statistics") for part in sent[name]]
        assert max(*silent, sent["first layer"][1], sent["no_grad"][1]) < 500


def test_one_value_in_total_is_refused_on_every_rank(seen):
    for r, rank in enumerate(seen):
        refused = rank["refused"]
        assert refused["error"].startswith(
            "Expected more than 1 value per channel when training, got 1 on all"
        )
        assert refused["unchanged"]
        assert refused["tracked"] == 1
        torch.testing.assert_close(refused["y"], torch.full((int(r < 2), 3), 2.0 * r - 1), rtol=1e-4, atol=0)


@only_2
def test_all_shares_empty(seen):
    for rank in seen:
        empty = rank["empty"]
        assert empty["y"].shape == empty["grads"][0].shape == empty["grads"][1].shape == (0, 3, 2, 2)
        assert all(torch.equal(grad, torch.zeros(3)) for grad in empty["grads"][2:])
        assert torch.equal(empty["mean"], torch.zeros(3))
        assert torch.equal(empty["var"], torch.ones(3))


def test_backward_is_joined_by_ranks_that_want_no_gradient(seen):
    case = sync_ranks.Case((12, 5, 6, 6), layer={"affine": False})
    dx = seen[0]["one_rank_wants_dx"]["dx"]
    assert ulps(dx, judged(case)["dx"][: len(dx)]) <= 1
    assert all(rank["one_rank_wants_dx"]["dx"] is None for rank in seen[1:])


@only_2
def test_what_pytorch_refuses_is_refused_before_anything_is_sent(seen):
    errors, plain = seen[0]["autograd"]["errors"], nn.BatchNorm1d(5)
    for name, x in {
        "channels": torch.zeros(2, 4),
        "dtype": torch.zeros(2, 5, dtype=torch.float64),
        "integers": torch.zeros(2, 5, dtype=torch.int64),
    }.items():
        with pytest.raises(RuntimeError) as refusal:
            plain(x)
        assert errors[name] == str(refusal.value)
    assert "meta" in errors["device"]


@only_2
def test_what_is_changed_in_place_is_caught(seen):
    for rank in seen:
        for name in ("x", "residual", "weight"):
            assert "modified by an inplace operation" in rank["autograd"]["errors"][name]


@only_2
def test_second_derivatives_are_refused(seen):
    for rank in seen:
        assert "create_graph" in rank["autograd"]["errors"]["create_graph"]


@only_2
def test_other_memory_orders_of_dy_and_strided_x(seen):
    for rank in seen:
        wanted, strided = rank["autograd"]["wanted"], rank["autograd"]["seen"]
        assert all(torch.equal(strided[key], wanted[key]) for key in ("y", "dx", "dweight"))
    case = sync_ranks.Case((12, 5, 6, 6))
    dx = torch.cat([rank["autograd"]["wanted"]["dx"] for rank in seen])
    assert ulps(dx, judged(case)["dx"]) <= 1


@only_2
def test_nan_of_one_rank_enters_the_statistics_of_all(seen):
    channel = torch.tensor([False, True, False])
    for rank in seen:
        saw = rank["not_finite"]
        assert torch.equal(saw["y"].isnan().all(0).all(1), channel)
        assert torch.equal(saw["y"].isnan().any(0).any(1), channel)
        assert torch.equal(saw["mean"].isnan(), channel)
        assert torch.equal(saw["var"].isnan(), channel)


@only_2
def test_gamma_of_nan_makes_its_channel_nan(seen):
    for rank in seen:
        nan, finite = rank["not_finite"]["nan"], rank["not_finite"]["finite"]
        assert nan["y"][:, 0].isnan().all()
        assert nan["dx"][:, 0].isnan().all()
        for key in ("y", "dx"):
            torch.testing.assert_close(nan[key][:, 1:], finite[key][:, 1:])
        for key in ("dweight", "dbias"):
            torch.testing.assert_close(nan[key][1:], finite[key][1:])


@only_2
@pytest.mark.parametrize("name", ["autocast", "compiler", "checkpoint", "broadcast", "promoted"])
def test_the_layer_in_its_surroundings(seen, name):
    for rank in seen:
        result = rank["surroundings"][name]
        assert all(torch.equal(*pair) for pair in zip(result["seen"], result["wanted"], strict=True))


def test_distributed_data_parallel_trains_like_one_process(seen):
    alone = sync_ranks.train(sync_ranks.network(sync=False), [slice(None)] * 4, 1 / 12).state_dict()
    for rank in seen:
        state = rank["data_parallel"]
        assert list(state) == list(alone)
        for name, value in state.items():
            torch.testing.assert_close(value.double(), alone[name].double(), rtol=1e-4, atol=1e-5)
            assert torch.equal(value, seen[0]["data_parallel"][name])


@only_4
def test_a_process_group_is_obeyed(seen):
    for r, rank in enumerate(seen):
        for key in ("mean", "converted"):
            assert torch.equal(rank["groups"][key], torch.full((2,), 2 * (r // 2) + 0.5))


@only_2
def test_a_rank_that_does_not_join_is_an_error_after_the_time_out(seen):
    stuck = seen[0]["stuck"]
    assert "Timed out" in stuck["error"]
    assert 1 <= stuck["seconds"] < SECONDS


def test_a_rank_that_dies_is_an_error_on_the_others(seen):
    for rank in seen[:-1]:
        assert rank["death"]["seconds"] < SECONDS + 5
        assert "gloo" in rank["death"]["error"]
    assert "death" not in seen[-1]


# In one process.


def test_constructor_is_pytorchs_with_an_activation():
    ours, theirs = (dict(inspect.signature(t).parameters) for t in (SyncBatchNorm, nn.SyncBatchNorm))
    assert ours.pop("activation").default is None
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert issubclass(SyncBatchNorm, _BatchNorm)
    assert not issubclass(SyncBatchNorm, nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="activation"):
        SyncBatchNorm(3, activation="tanh")


@pytest.mark.parametrize("training", [True, False])
def test_without_a_process_group_it_is_a_batch_norm(training):
    case = CASES["residual, relu"]
    layers = [
        sync_ranks.parameters(t(5, activation="relu")).train(training) for t in (SyncBatchNorm, BatchNorm2d)
    ]
    sync, plain = (sync_ranks.steps(layer, case, slice(None)) for layer in layers)
    assert sync.keys() == plain.keys()
    assert all(torch.equal(sync[key], plain[key]) for key in plain)


@pytest.mark.parametrize("shape", [(4,), (4, 0), (1, 3), (4, 5)], ids=str)
def test_refusals_are_pytorchs(shape):
    refusals = []
    for layer in SyncBatchNorm(3), nn.SyncBatchNorm(3):
        with pytest.raises((ValueError, RuntimeError)) as refusal:
            layer(torch.zeros(shape))
        refusals.append((refusal.type, str(refusal.value)))
    assert refusals[0] == refusals[1]


def test_copies_and_pickles():
    layer = sync_ranks.parameters(SyncBatchNorm(5, activation="relu"))
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert other.activation == "relu"
        x = sync_ranks.batch(CASES["4d"], 0)[0]
        assert torch.equal(layer.eval()(x), other.eval()(x))
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(plain.state_dict(), strict=True)


class Mine(nn.BatchNorm2d):
    """A subclass, which may do anything."""


def test_convert_takes_exact_types_and_shares_everything():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    kinds += (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
    net = nn.ModuleDict({
        **{str(i): kind(3, eps=1e-3, momentum=None) for i, kind in enumerate(kinds)},
        "nested": nn.Sequential(nn.Sequential(BatchNorm2d(3, activation="relu6"), nn.Conv2d(3, 3, 1))),
        "mine": Mine(3),
        "lazy": nn.LazyBatchNorm2d(),
        "overwritten": nn.BatchNorm2d(3),
        "bare": nn.BatchNorm2d(3, affine=False, track_running_stats=False).eval(),
    })  # fmt: skip
    net["overwritten"].forward = lambda x: x
    net["again"] = net["nested"][0][0]
    net["nested_again"] = net["nested"]
    before = dict(net.state_dict(keep_vars=True))
    calls = []
    net["1"].register_forward_hook(lambda *_: calls.append(1))
    group = object()
    assert SyncBatchNorm.convert_sync_batchnorm(net, group) is net

    after = dict(net.state_dict(keep_vars=True))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    for i in range(len(kinds)):
        layer = net[str(i)]
        assert type(layer) is SyncBatchNorm
        assert (layer.eps, layer.momentum, layer.activation, layer.training) == (1e-3, None, None, True)
        assert layer.process_group is group
    inner = net["nested"][0][0]
    assert type(inner) is SyncBatchNorm
    assert inner.activation == "relu6"
    assert net["again"] is inner
    assert type(net["mine"]) is Mine
    assert type(net["lazy"]) is nn.LazyBatchNorm2d
    assert type(net["overwritten"]) is nn.BatchNorm2d
    assert type(net["bare"]) is SyncBatchNorm
    assert not net["bare"].training
    assert net["bare"].weight is net["bare"].running_mean is None
    net["1"](torch.zeros(2, 3, 1, 1))
    assert calls == [1]


def test_convert_of_a_layer_returns_a_new_one():
    old = BatchNorm2d(3, activation="relu")
    new = SyncBatchNorm.convert_sync_batchnorm(old)
    assert type(old) is BatchNorm2d
    assert type(new) is SyncBatchNorm
    assert (new.activation, new.process_group) == ("relu", None)
    assert new.weight is old.weight
    assert new.running_var is old.running_var
    new.weight = nn.Parameter(torch.zeros(3))
    assert torch.equal(old.weight, torch.ones(3))
    linear = nn.Linear(2, 2)
    assert SyncBatchNorm.convert_sync_batchnorm(linear) is linear
