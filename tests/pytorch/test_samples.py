"""PyTorch's own samples for batch norm: of its modules, of their errors, and of its operators."""

from __future__ import annotations

import pytest
import torch
from layer_cases import OURS, is_ours
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from batchnorm.torch._functional import batch_norm

# Samples that PyTorch 2.15 has; a later one may have more.
MODULE_SAMPLES = 88
ERROR_SAMPLES = 6
OPERATOR_SAMPLES = 48
SECOND_ORDER_SAMPLES = 10

INFOS = [info for info in module_db if info.module_cls in OURS]
OPERATOR = next(info for info in op_db if info.name == "nn.functional.batch_norm")


def counted(capsys, what, count, wanted):
    with capsys.disabled():
        print(f"\n{count} {what}")
    assert count >= wanted


def both(module_class, sample, **kwargs):
    """Ours and PyTorch's module of a sample, in the same state."""
    arguments = sample.constructor_input
    theirs = module_class(*arguments.args, **arguments.kwargs, **kwargs)
    ours = OURS[module_class](*arguments.args, **arguments.kwargs, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_modules(capsys):
    count = 0
    for info in INFOS:
        for dtype in info.dtypes:
            for training in (True, False):
                for sample in info.module_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=True, training=training
                ):
                    ours, theirs = both(info.module_cls, sample, dtype=dtype)
                    ours.train(training), theirs.train(training)
                    (x,), kwargs = sample.forward_input.args, sample.forward_input.kwargs
                    y, wanted = ours(x, **kwargs), theirs(x, **kwargs)
                    assert y.numel() == 0 or is_ours(y)
                    torch.testing.assert_close(y, wanted)
                    dy = torch.randn_like(y)
                    got = torch.autograd.grad(y, [x, *ours.parameters()], dy)
                    expected = torch.autograd.grad(wanted, [x, *theirs.parameters()], dy)
                    torch.testing.assert_close(got, expected)
                    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
                    count += 1
    counted(capsys, "module samples", count, MODULE_SAMPLES)


def test_module_errors(capsys):
    count = 0
    for info in INFOS:
        for sample in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            inputs = sample.module_error_input
            for module in both(info.module_cls, inputs):
                with pytest.raises(sample.error_type, match=sample.error_regex):
                    module(*inputs.forward_input.args, **inputs.forward_input.kwargs)
            count += 1
    counted(capsys, "error samples", count, ERROR_SAMPLES)


def arguments_of(sample):
    """The arguments of `torch.nn.functional.batch_norm` that a sample has, by name."""
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    given |= dict(zip(names, sample.args, strict=False)) | sample.kwargs
    return given


def ours_of(x, given):
    given = {name: value for name, value in given.items() if name != "momentum"} | {
        "update_weight": given["momentum"]
    }
    return batch_norm(x, **given)


def apart(given):
    """Running buffers that only one call updates."""
    return given | {
        name: given[name].detach().clone()
        for name in ("running_mean", "running_var")
        if given[name] is not None
    }


def test_operators(capsys):
    count = 0
    for dtype in sorted(OPERATOR.dtypes, key=str):
        for sample in OPERATOR.sample_inputs("cpu", dtype, requires_grad=True):
            x, given = sample.input, arguments_of(sample)
            mine, theirs = apart(given), apart(given)
            y, wanted = ours_of(x, mine), nn.functional.batch_norm(x, **theirs)
            # Without parameters PyTorch computes in 16 bits, less exactly.
            tolerance = {"rtol": 0.05, "atol": 0.02} if dtype.itemsize == 2 else {}
            torch.testing.assert_close(y, wanted, **tolerance)
            inputs = [x, *(given[name] for name in ("weight", "bias") if given[name] is not None)]
            dy = torch.randn_like(y)
            got = torch.autograd.grad(y, inputs, dy, allow_unused=True)
            expected = torch.autograd.grad(wanted, inputs, dy, allow_unused=True)
            torch.testing.assert_close(got, expected, **tolerance)
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(mine[name], theirs[name])
            count += 1
    counted(capsys, "operator samples", count, OPERATOR_SAMPLES)


def test_second_derivatives_of_operators(capsys):
    count = 0
    for sample in OPERATOR.sample_inputs("cpu", torch.float64, requires_grad=True):
        if sample.input.dim() < 2 or sample.input.numel() == 0:
            continue
        given = arguments_of(sample)
        names = [name for name in ("weight", "bias") if given[name] is not None]
        inputs = [sample.input, *(given[name] for name in names)]

        def function(x, *parameters, given=given, names=names):
            return ours_of(x, apart(given) | dict(zip(names, parameters, strict=True)))

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        count += 1
    counted(capsys, "operator samples differentiated twice", count, SECOND_ORDER_SAMPLES)
