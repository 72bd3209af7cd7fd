"""What eager code asks before it calls the core itself: tensors, and where a layer keeps its own."""

from __future__ import annotations

import pytest
import torch
from layer_cases import SHAPES, is_ours, pair, tensors
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from batchnorm._core import HostTypes
from batchnorm.torch._functional import _takes, count_batch
from batchnorm.torch._host import TYPES

SHAPE = SHAPES[nn.BatchNorm2d]
CHANNELS = SHAPE[1]


class Subclass(torch.Tensor):
    pass


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.ones(4, 5)


def without_memory():
    tensor = torch.ones(4, 5)
    tensor.untyped_storage().resize_(0)
    return tensor


def leaked_from_vmap():
    seen = []
    torch.vmap(lambda x: seen.append(x) or x)(torch.ones(3, 4, 5))
    return seen[0]


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: torch.ones(4, 5), True),
        (lambda: torch.ones(4, 5).requires_grad_() * 2, True),
        (lambda: nn.Parameter(torch.ones(4, 5)), True),
        (made_in_inference_mode, True),
        (lambda: torch.ones(1, 5).expand(4, 5), True),
        (lambda: torch.ones(4, 5).as_subclass(Subclass), False),
        (lambda: torch._neg_view(torch.ones(4, 5)), False),
        (lambda: torch._efficientzerotensor(4, 5), False),
        (lambda: torch.ones(4, 5).to_sparse(), False),
        (lambda: torch.ones(4, 5).to_sparse_csr(), False),
        (lambda: torch.ones(4, 5).to_mkldnn(), False),
        (lambda: torch.ones(4, 5, device="meta"), False),
        (lambda: torch._to_functional_tensor(torch.ones(4, 5)), False),
        (lambda: torch.nested.nested_tensor([torch.ones(5), torch.ones(5)]), False),
        (without_memory, False),
        (leaked_from_vmap, False),
        (lambda: None, False),
        (lambda: [1.0], False),
    ],
)
@pytest.mark.filterwarnings("ignore")  # prototypes of PyTorch
def test_plain_tensors(make, plain):
    assert TYPES.is_plain(make()) is plain


def vector(**kwargs):
    return torch.ones(CHANNELS, **kwargs)


USUAL = {"x": torch.ones(SHAPE), "weight": vector(), "bias": vector(), "residual": torch.ones(SHAPE)}
USUAL |= {"running_mean": vector(), "running_var": vector()}
WIDE = {name: tensor.double() for name, tensor in USUAL.items()}
NONE = dict.fromkeys(["weight", "bias", "residual"])
STATISTICS = ("running_mean", "running_var")


@pytest.mark.parametrize(
    ("given", "in_training", "in_evaluation"),
    [
        (USUAL, True, True),
        (WIDE, True, True),
        ({"x": USUAL["x"].half(), "residual": USUAL["x"].half()}, True, True),
        ({"x": USUAL["x"].bfloat16(), "residual": None}, True, True),
        (NONE, True, True),
        ({"weight": nn.Parameter(vector())}, True, True),
        ({"x": torch.ones(4, CHANNELS), "residual": None}, True, True),
        ({"x": USUAL["x"][:, :, ::2], "residual": None}, True, True),
        ({"residual": USUAL["x"].to(memory_format=torch.channels_last)}, True, True),
        (dict.fromkeys(STATISTICS), True, False),
        ({"running_mean": None}, False, False),
        ({"running_var": None}, False, False),
        ({"running_mean": vector(requires_grad=True)}, False, False),
        ({"x": torch.ones(CHANNELS), "residual": None}, False, False),
        ({"x": torch.ones(0, CHANNELS), "residual": None}, False, False),
        ({"x": torch.ones(1, CHANNELS, 1), "residual": None}, False, True),
        ({"x": torch.ones(SHAPE, dtype=torch.int32), "residual": None}, False, False),
        ({"x": torch.ones(SHAPE, dtype=torch.complex64), "residual": None}, False, False),
        ({"x": WIDE["x"], "residual": None}, False, False),
        ({"x": USUAL["x"].as_subclass(Subclass)}, False, False),
        ({"x": USUAL["x"].to_sparse(), "residual": None}, False, False),
        ({"residual": torch.ones((*SHAPE[:-1], 1))}, False, False),
        ({"residual": WIDE["residual"]}, False, False),
        ({"weight": vector(dtype=torch.float64)}, False, False),
        ({"weight": torch.ones(CHANNELS + 1)}, False, False),
        ({"bias": torch.ones(1, CHANNELS)}, False, False),
        ({"bias": torch.ones(2 * CHANNELS)[::2]}, False, False),
        ({"running_var": vector(device="meta")}, False, False),
    ],
)
def test_what_a_pass_takes(given, in_training, in_evaluation):
    """The compiler is told the same as eager code."""
    arguments = {**USUAL, **given}
    for training, wanted in ((True, in_training), (False, in_evaluation)):
        assert TYPES.takes(**arguments, training=training) is wanted
        assert _takes(**arguments, training=training) is wanted


@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean"])
def test_lazily_negated_parameters(name, training):
    layers = pair(training=training)
    (x,) = tensors(SHAPE, 1)
    results = []
    for layer in layers:
        negated = torch._neg_view(getattr(layer, name).detach().clone())
        results.append(functional_call(layer, {name: negated}, (x,)))
    torch.testing.assert_close(*results)


def test_each_batch_is_counted_once_and_seen_by_autograd():
    layer, _ = pair()
    count, version = layer.num_batches_tracked, layer.num_batches_tracked._version
    for _ in range(3):
        layer(torch.randn(SHAPE))
    assert layer.num_batches_tracked is count
    assert (count.item(), count._version) == (3, version + 3)


@pytest.mark.parametrize(
    ("count", "incremented"),
    [
        (torch.tensor(2), True),
        (nn.Parameter(torch.tensor(2), requires_grad=False), True),
        (torch.tensor([2]), False),
        (torch.tensor(2, dtype=torch.int32), False),
        (torch.tensor(2.0), False),
        (torch.tensor(2).as_subclass(Subclass), False),
        (2, False),
    ],
)
def test_counts_that_the_core_increments(count, incremented):
    assert TYPES.increment(count) is incremented
    assert int(count) == 2 + incremented
    if isinstance(count, torch.Tensor):
        count_batch(count)
        assert int(count) == 3 + incremented


def test_counts_of_inference_mode_change_only_there():
    with torch.inference_mode():
        count = torch.tensor(2)
        count_batch(count)
    assert count.item() == 3
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        count_batch(count)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 2)


def parametrized(layer):
    parametrize.register_parametrization(layer, "bias", nn.Softplus())


def plain_attributes(layer):
    for name in ("weight", "running_mean"):
        value = getattr(layer, name).detach() * 2
        delattr(layer, name)
        setattr(layer, name, value)


@pytest.mark.parametrize("change", [pruned, parametrized, plain_attributes])
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
def test_parameters_that_another_tool_keeps_elsewhere(change, training):
    layers = pair(training=training)
    (x,) = tensors(SHAPE, 1)
    results = []
    for layer in layers:
        change(layer)
        y = layer(x)
        results += [(y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]), layer.running_mean)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert is_ours(layers[0](x))


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
@pytest.mark.parametrize("tracked", [True, False], ids=("tracked", "untracked"))
def test_deleted_attributes_are_missed_where_pytorch_misses_them(name, training, tracked):
    (x,) = tensors(SHAPE, 1)
    missed = []
    for layer in pair(training=training):
        layer.track_running_stats = tracked
        delattr(layer, name)
        try:
            layer(x)
            missed.append("")
        except AttributeError as error:
            missed.append(str(error))
    assert missed[0] == missed[1]


def test_the_types_need_the_exchange_api():
    with pytest.raises(TypeError, match=r"^tensor_type is .*int; wanted the tensor type of a library"):
        HostTypes(int, int)
