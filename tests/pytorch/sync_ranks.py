"""What each process of the tests of SyncBatchNorm runs. It writes what it saw to a file, for the tests."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import SyncBatchNorm


class Case(NamedTuple):
    """A layer, and the batch that the ranks share."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layer: Mapping[str, object] = MappingProxyType({})
    residual: bool = False
    memory: torch.memory_format = torch.contiguous_format
    shares: dict[int, tuple[int, ...]] | None = (
        None  # rows of each rank, by the number of ranks; None: as equal as can be
    )
    steps: int = 1
    mean: float = 3.0

    @property
    def parameters(self):
        """The dtype of parameters and buffers."""
        return self.layer.get("dtype", torch.float32)


UNEQUAL = {2: (1, 11), 4: (3, 1, 6, 2)}
EMPTY = {2: (0, 12), 4: (5, 0, 7, 0)}
BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
CASES = {
    "2d": Case((12, 5)),
    "3d": Case((12, 5, 7)),
    "4d": Case((12, 5, 6, 6)),
    "5d": Case((12, 5, 2, 3, 4)),
    "one channel": Case((12, 1, 9)),
    "unequal": Case((12, 5, 6, 6), shares=UNEQUAL),
    "an empty share": Case((12, 5, 6, 6), shares=EMPTY),
    "an empty share of rank 2": Case((12, 5), shares=EMPTY),
    "channels last": Case((12, 5, 6, 6), memory=LAST),
    "channels last, empty": Case((12, 5, 6, 6), memory=LAST, shares=EMPTY),
    "channels last 3d": Case((12, 5, 2, 3, 4), memory=LAST_3D, shares=UNEQUAL),
    "relu": Case((12, 5, 6, 6), layer={"activation": "relu"}),
    "residual": Case((12, 5, 6, 6), residual=True, shares=UNEQUAL),
    "residual, relu": Case((12, 5, 6, 6), layer={"activation": "relu"}, residual=True, shares=EMPTY),
    "residual, relu6": Case((12, 5, 6, 6), layer={"activation": "relu6"}, residual=True, memory=LAST),
    "no affine": Case((12, 5, 6, 6), layer={"affine": False}),
    "no bias": Case((12, 5, 6, 6), layer={"bias": False}, shares=UNEQUAL),
    "no statistics": Case((12, 5, 6, 6), layer={"track_running_stats": False}),
    "cumulative": Case((12, 5), layer={"momentum": None}, steps=3, shares=UNEQUAL),
    "far from 0": Case((12, 5, 6, 6), mean=1000.0, shares=UNEQUAL),
    "float64": Case((12, 5, 6, 6), F64, layer={"dtype": F64, "momentum": 1.0}, shares=UNEQUAL),
    "float64, empty": Case((12, 5), F64, layer={"dtype": F64, "momentum": 1.0}, shares=EMPTY),
    "float16": Case((12, 5, 6, 6), F16, shares=UNEQUAL),
    "bfloat16": Case((12, 5, 6, 6), BF16, shares=UNEQUAL, memory=LAST),
    "bfloat16, residual, relu": Case((12, 5, 6, 6), BF16, layer={"activation": "relu"}, residual=True),
    "all bfloat16": Case((12, 5, 6, 6), BF16, layer={"dtype": BF16}),
}
SECONDS = 20  # time-out of the communication


def batch(case, step, rows=slice(None)):
    """Rows of x, residual and dy of a step: the same on every rank."""
    rng = np.random.default_rng(1000 + step)
    values = (
        torch.from_numpy(rng.normal(mean, std, case.shape)) for mean, std in ((case.mean, 2), (0, 1), (0, 1))
    )
    return tuple(v.to(case.dtype).to(memory_format=case.memory)[rows] for v in values)


def parameters(layer):
    """Gives γ and β of a layer some values."""
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(torch.linspace(0.5, 1.5, layer.num_features))
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, layer.num_features))
    return layer


def share(case, rank, ranks):
    """The rows of a rank."""
    rows = case.shape[0]
    sizes = case.shares[ranks] if case.shares else (rows // ranks,) * ranks
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def steps(layer, case, rows, wide=False):
    """Runs a layer on some rows of the batches (wide: in float64); what it gives, as tensors by name."""
    seen = {}
    for step in range(case.steps):
        tensors = batch(case, step, rows)
        x, residual, dy = (t.double() for t in tensors) if wide else tensors
        x, residual = x.requires_grad_(), residual.requires_grad_()
        layer.zero_grad()
        y = layer(x, residual) if case.residual else layer(x)
        y.backward(dy)
        seen = {"y": y.detach(), "dx": x.grad}
        if case.residual:
            seen["dresidual"] = residual.grad
        seen |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return seen | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def cases(rank, ranks):
    """All cases."""
    seen = {}
    for name, case in CASES.items():
        layer = parameters(SyncBatchNorm(case.shape[1], **case.layer))
        seen[name] = steps(layer, case, share(case, rank, ranks))
    return seen


class Sent:
    """Counts the `bytes` that the process writes meanwhile, to sockets too."""

    def __enter__(self):
        dist.barrier()
        self.bytes = -self._written()
        return self

    def __exit__(self, *error):
        self.bytes += self._written()
        dist.barrier()

    @staticmethod
    def _written():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["wchar"])


WIDTH = 1000  # channels, so that the headers of messages do not count


def sent(rank, ranks):
    """What a forward and a backward pass send."""

    def of(layer, x, backward=True):
        with Sent() as forward:
            y = layer(x)
        with Sent() as back:
            if backward:
                y.sum().backward()
        return forward.bytes, back.bytes

    layer, grouped = SyncBatchNorm(WIDTH), SyncBatchNorm(WIDTH)
    grouped.process_group = [dist.new_group([r]) for r in range(ranks)][rank]
    share, x = torch.randn(0 if rank == 0 else 4, WIDTH, 3), torch.randn(4, WIDTH, 3)
    return {
        "training": of(layer, share.clone().requires_grad_()),
        "first layer": of(layer, share),
        "no_grad": torch.no_grad()(of)(layer, share.clone().requires_grad_(), backward=False),
        "group of one": of(grouped, x.clone().requires_grad_()),
        "eval": of(layer.eval(), x.clone().requires_grad_()),
        "eval without statistics": of(SyncBatchNorm(WIDTH, track_running_stats=False).eval(), x),
    }


def refused(rank, ranks):
    """One value a channel in total: refused on every rank, and nothing changes. Two are taken."""
    layer = SyncBatchNorm(3)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    error = None
    try:
        layer(torch.randn(1 if rank == 1 else 0, 3))
    except ValueError as e:
        error = str(e)
    unchanged = all(torch.equal(state[name], t) for name, t in layer.state_dict().items())
    y = layer(torch.full((1 if rank < 2 else 0, 3), float(rank)))
    return {
        "error": error,
        "unchanged": unchanged,
        "y": y.detach(),
        "tracked": layer.num_batches_tracked.item(),
    }


def empty(rank, ranks):
    """No rank has a value."""
    layer = SyncBatchNorm(3, activation="relu")
    x, residual = (torch.empty(0, 3, 2, 2, requires_grad=True) for _ in range(2))
    y = layer(x, residual)
    y.sum().backward()
    grads = [t.grad for t in (x, residual, layer.weight, layer.bias)]
    return {"y": y.detach(), "grads": grads, "mean": layer.running_mean, "var": layer.running_var}


def one_rank_wants_dx(rank, ranks):
    """Only rank 0 wants a gradient of x, and no rank has parameters: all ranks take part in backward."""
    case = Case((12, 5, 6, 6))
    x, _, dy = batch(case, 0, share(case, rank, ranks))
    x.requires_grad_(rank == 0)
    y = SyncBatchNorm(5, affine=False)(x)
    y.backward(dy)
    return {"dx": x.grad}


def autograd(rank, ranks):
    """What is refused, what autograd catches, and other memory orders."""
    errors = {}

    def catch(name, work):
        try:
            work()
        except (RuntimeError, ValueError) as e:
            errors[name] = str(e)

    layer = parameters(SyncBatchNorm(5, activation="relu"))
    for name, x in {
        "channels": torch.zeros(2, 4),
        "dtype": torch.zeros(2, 5, dtype=F64),
        "integers": torch.zeros(2, 5, dtype=torch.int64),
        "device": torch.zeros(2, 5, device="meta"),
    }.items():
        if rank == 0:  # nothing is sent
            catch(name, lambda x=x: layer(x))

    for name in ("x", "residual", "weight"):
        x, residual = (torch.randn(4, 5, 3, requires_grad=True) for _ in range(2))
        inner = x * 1, residual * 1
        y = layer(*inner)
        with torch.no_grad():
            {"x": inner[0], "residual": inner[1], "weight": layer.weight}[name].mul_(2)
        catch(name, y.sum().backward)
    x = torch.randn(4, 5, 3, requires_grad=True)
    catch("create_graph", lambda: torch.autograd.grad(layer(x).sum(), x, create_graph=True))

    wanted, seen = {}, {}
    case = Case((12, 5, 6, 6))
    whole, _, dwhole = batch(case, 0, share(case, rank, ranks))
    dwhole = dwhole.contiguous(memory_format=LAST)
    strided = whole.repeat_interleave(2, dim=3)[..., ::2]
    assert not strided.is_contiguous()
    for kind, x in {"dense": whole, "strided": strided}.items():
        layer = parameters(SyncBatchNorm(5))
        x = x.detach().requires_grad_()
        y = layer(x)
        y.backward(dwhole)
        (wanted if kind == "dense" else seen).update(y=y.detach(), dx=x.grad, dweight=layer.weight.grad)
    return {"errors": errors, "wanted": wanted, "seen": seen}


def not_finite(rank, ranks):
    """A NaN of one rank enters the statistics of all; γ of NaN makes its own channel NaN."""
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3, 2)
    if rank == 1:
        x[0, 1, 0] = torch.nan
    y = layer(x).detach()
    seen = {"y": y, "mean": layer.running_mean.clone(), "var": layer.running_var.clone()}
    layer = parameters(SyncBatchNorm(3, activation="relu"))
    finite = parameters(SyncBatchNorm(3, activation="relu"))
    with torch.no_grad():
        layer.weight[0] = torch.nan
    for name, one in ("nan", layer), ("finite", finite):
        x = torch.linspace(0, 1, 24).view(4, 3, 2).sin().mul(rank + 1).requires_grad_()
        y = one(x, torch.ones(4, 3, 2))
        y.square().sum().backward()
        seen[name] = {"y": y.detach(), "dx": x.grad, "dweight": one.weight.grad, "dbias": one.bias.grad}
    return seen


def network(sync=True):
    """A small network, whose first layer of batch norm has an input that wants a gradient."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 2),
        nn.BatchNorm1d(2),
    )
    return SyncBatchNorm.convert_sync_batchnorm(net) if sync else net


def images(step):
    """Inputs and targets of a training step."""
    rng = torch.Generator().manual_seed(step)
    return torch.randn(12, 3, 6, 6, generator=rng), torch.randn(12, 2, generator=rng)


def train(net, rows, scale):
    """Trains for some steps; in each the rows of `rows` as they are then."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step, part in enumerate(rows):
        x, wanted = images(step)
        optimizer.zero_grad()
        loss = (net(x[part]) - wanted[part]).square().sum() * scale
        loss.backward()
        optimizer.step()
    return net


def data_parallel(rank, ranks):
    """DistributedDataParallel over shares that differ from step to step; one is empty."""
    shares = [share(Case((12,), shares=shares), rank, ranks) for shares in (None, UNEQUAL, EMPTY, None)]
    net = train(DistributedDataParallel(network()), shares, ranks / 12)
    return dict(net.module.state_dict())


def surroundings(rank, ranks):
    """Autocast, checkpoint and compiler; residuals of another shape or dtype."""
    x = torch.randn(4, 5, 3)
    results = {}

    def pair(name, work, plain):
        for key, function in ("seen", work), ("wanted", plain):
            layer, leaf = parameters(SyncBatchNorm(5, activation="relu")), x.clone().requires_grad_()
            y = function(layer, leaf)
            y.square().sum().backward()
            results.setdefault(name, {})[key] = [y.detach(), leaf.grad, layer.weight.grad]

    def autocast(layer, x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def with_residual(residual):
        def plain(layer, x):
            layer.activation = None
            return torch.relu(layer(x) + residual)

        return lambda layer, x: layer(x, residual), plain

    pair("autocast", autocast, lambda layer, x: layer(x))
    pair("compiler", lambda layer, x: torch.compile(layer, backend="eager")(x), lambda layer, x: layer(x))
    pair("checkpoint", lambda layer, x: checkpoint(layer, x, use_reentrant=False), lambda layer, x: layer(x))
    pair("broadcast", *with_residual(torch.randn(5, 1)))
    pair("promoted", *with_residual(torch.randn(4, 5, 3, dtype=F64)))
    return results


def groups(rank, ranks):
    """Two groups, each with a batch of its own."""
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    layer = SyncBatchNorm(2, process_group=pairs[rank // 2], momentum=1.0)
    layer(torch.full((2, 2), float(rank)))
    converted = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(2, momentum=1.0), pairs[rank // 2])
    converted(torch.full((2, 2), float(rank)))
    return {"mean": layer.running_mean, "converted": converted.running_mean}


def stuck(rank, ranks):
    """A rank that never joins: the others get an error after the time-out of their group."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    layer = SyncBatchNorm(2, process_group=group)
    if rank == ranks - 1:
        return {}
    return failed(lambda: layer(torch.randn(4, 2)))


def failed(work):
    """The error of some work, and the seconds that it took."""
    start = time.monotonic()
    try:
        work()
    except RuntimeError as e:
        return {"error": str(e), "seconds": time.monotonic() - start}
    return {}


def death(rank, ranks):
    """The last rank dies before backward, with the exit code 0 that the launcher takes for a good end."""
    y = SyncBatchNorm(2)(torch.randn(4, 2, requires_grad=True))
    if rank == ranks - 1:
        os._exit(0)
    return failed(y.sum().backward)


SCENARIOS = {
    2: (
        cases,
        sent,
        refused,
        empty,
        one_rank_wants_dx,
        autograd,
        not_finite,
        surroundings,
        data_parallel,
        stuck,
        death,
    ),
    4: (cases, sent, refused, one_rank_wants_dx, data_parallel, groups, death),
}


def run(rank, ranks, folder):
    """Runs all scenarios; after each, the file of this rank holds what was seen so far."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, ranks, rank)
    seen = {}
    for scenario in SCENARIOS[ranks]:
        torch.manual_seed(rank)
        seen[scenario.__name__] = scenario(rank, ranks)
        torch.save(seen, f"{folder}/{rank}.pt")
