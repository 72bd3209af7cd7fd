"""The operators `torch.ops.batchnorm.*`: the passes of the core as PyTorch and its compiler see them.

    train            y and moments of a batch by its own statistics; updates the running buffers in place
    infer            y by given statistics
    backward         gradients of train
    infer_backward   gradients of infer

Each has a CPU kernel, which allocates the outputs and calls the core once; a fake kernel, which tells the
compiler shapes and strides of the outputs; and an autograd kernel. Where the core refuses the value of a
parameter that PyTorch takes (an infinite weight, say), the CPU kernel does the same by PyTorch's operators.

With C channels on axis 1, x is float32, float64, float16 or bfloat16; weight, bias and the statistics have
shape (C,) and are float64 for x of float64, else float32; residual and dy have the shape and dtype of x;
`moments` is float64 of shape (3, C): count, mean, M2. The gradients are those of x, weight and bias, each
None where that tensor is None.

The backward operators know no residual. Where there was one, dy first passes the activation by y, as in
PyTorch, and what passes is the residual's gradient too. What reads y next keeps it anyway, most often.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, empty_like, get_num_threads, is_grad_enabled
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _increment_version as increment_version
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
from torch.autograd import Function, forward_ad
from torch.library import Library, register_fake

from batchnorm.torch import _formulas
from batchnorm.torch._host import HOST, TYPES

Activation = Literal["relu", "relu6"] | None
Gradients = tuple[Tensor, Tensor | None, Tensor | None]

LIBRARY: Final[Any] = Library("batchnorm", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float update_weight, float eps, str? activation) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "infer(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var,"
    " float eps, str? activation) -> Tensor"
)
LIBRARY.define(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor moments, float eps, str? activation)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "infer_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
    " str? activation) -> (Tensor, Tensor, Tensor)"
)
TRAIN: Final[Any] = torch.ops.batchnorm.train.default
INFER: Final[Any] = torch.ops.batchnorm.infer.default
BACKWARD: Final[Any] = torch.ops.batchnorm.backward.default
INFER_BACKWARD: Final[Any] = torch.ops.batchnorm.infer_backward.default

# Kinds of errors of the core about values that PyTorch takes.
TAKEN_BY_PYTORCH: Final = frozenset(
    ["NotFinite", "Negative", "Eps", "EpsZeroInTraining", "EpsZeroForZeroVariance", "Range", "TooFewValues"]
)


def _is_taken_by_pytorch(error: ValueError) -> bool:
    return getattr(error, "kind", None) in TAKEN_BY_PYTORCH


# CPU kernels. What PyTorch allocates like x is dense; so x is dense if it has the same strides.


def _ordered(like: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor in the memory order of `like`: a copy where it has another."""
    return tensor if tensor.stride() == like.stride() else empty_like(like).copy_(tensor)


def train_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    update_weight: float,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    y, moments = _train_fake(x)
    x = _ordered(y, x)
    residual = None if residual is None else _ordered(y, residual)
    threads = get_num_threads()
    running = running_mean, running_var
    try:
        HOST.train(
            x,
            weight,
            bias,
            residual,
            running_mean,
            running_var,
            y,
            moments,
            threads=threads,
            update_weight=update_weight,
            eps=eps,
            activation=activation,
        )
    except ValueError as error:
        if not _is_taken_by_pytorch(error):
            raise
        HOST.moments(x, moments, threads=threads)
        y.copy_(_formulas.native(x, weight, bias, residual, *running, True, update_weight, eps, activation))
    for buffer in running:
        if buffer is not None:  # autograd does not see what the core writes
            increment_version((buffer,))
    return y, moments


def infer_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Activation,
) -> Tensor:
    y = _infer_fake(x)
    x = _ordered(y, x)
    residual = None if residual is None else _ordered(y, residual)
    try:
        HOST.infer(
            x,
            weight,
            bias,
            residual,
            mean,
            var,
            y,
            threads=get_num_threads(),
            eps=eps,
            activation=activation,
        )
    except ValueError as error:
        if not _is_taken_by_pytorch(error):
            raise
        y.copy_(_formulas.native(x, weight, bias, residual, mean, var, False, 0.0, eps, activation))
    return y


def _gradients_cpu(
    host_pass: Callable[..., None], formula: Callable[..., Gradients]
) -> Callable[..., Gradients]:
    """Make the CPU kernel of backward or of infer_backward."""

    def kernel(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Gradients:
        *statistics, eps, activation = rest
        dx, dweight, dbias = outputs = _gradients_fake(dy, x, weight, bias)
        try:
            host_pass(
                *(_ordered(dx, dy), _ordered(dx, x), weight, bias, None),
                *(*statistics, dx, None, dweight, dbias),
                threads=get_num_threads(),
                eps=eps,
                activation=activation,
            )
        except ValueError as error:
            if not _is_taken_by_pytorch(error):
                raise
            for output, value in zip(outputs, formula(dy, x, weight, bias, *rest), strict=True):
                if output is not None and value is not None:
                    output.copy_(value)
        return outputs

    return kernel


# The gradients by PyTorch's operators, which can be differentiated once more.


def _train_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    eps: float,
    activation: Activation,
) -> Gradients:
    with torch.no_grad():
        if activation is not None:
            y = TRAIN(x, weight, bias, None, None, None, 0.0, eps, activation)[0]
        count, mean, m2 = moments.unbind()
        var = m2 / count
    if activation is not None:
        dy = _formulas.through(dy, y, activation)
    return _formulas.gradients(dy, x, weight, bias, mean, var, True, eps)


def _infer_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Activation,
) -> Gradients:
    if activation is not None:
        with torch.no_grad():
            y = INFER(x, weight, bias, None, mean, var, eps, activation)
        dy = _formulas.through(dy, y, activation)
    return _formulas.gradients(dy, x, weight, bias, mean, var, False, eps)


# Fake kernels, which also allocate for the CPU kernels.


def _train_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(x), x.new_empty((3, x.shape[1]), dtype=torch.float64)


def _infer_fake(x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def _gradients_fake(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> Gradients:
    return (
        empty_like(x),
        None if weight is None else empty_like(weight),
        None if bias is None else empty_like(bias),
    )


# Autograd kernels. Each leads to its operator below autograd. Eager code has them call the CPU kernel itself,
# which spares the way through the dispatcher.


def _needs_graph(*tensors: Tensor | None) -> bool:
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class BatchNormTrain(Function):
    """Node of the graph for train."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., Any],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        """Call the kernel, and save what backward needs."""
        *_, eps, activation = rest
        y, moments = kernel(x, weight, bias, residual, *rest)
        gate = None if activation is None or residual is None else y
        ctx.save_for_backward(x, weight, bias, gate, moments)
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        ctx.settings = eps, activation
        return y, moments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients as the operator backward does."""
        return None, *_gradients_of(ctx, grads[0], backward, backward_cpu), None


class BatchNormInfer(Function):
    """Node of the graph for infer."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., Any],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        """Call the kernel, and save what backward needs."""
        mean, var, eps, activation = rest
        y: Tensor = kernel(x, weight, bias, residual, *rest)
        gate = None if activation is None or residual is None else y
        ctx.save_for_backward(x, weight, bias, gate, mean, var)
        ctx.set_materialize_grads(False)
        ctx.settings = eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients as the operator infer_backward does."""
        return None, *_gradients_of(ctx, grads[0], infer_backward, infer_backward_cpu), None


def _gradients_of(
    ctx: Any, dy: Tensor | None, function: Callable[..., Gradients], kernel: Callable[..., Gradients]
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    if not is_grad_enabled() and is_eager() and TYPES.is_plain(dy):
        function = kernel
    x, weight, bias, gate, *statistics = ctx.saved_tensors
    eps, activation = ctx.settings
    if gate is not None:
        dy, activation = _formulas.through(dy, gate, activation), None
    gradients = function(dy, x, weight, bias, *statistics, eps, activation)
    return *gradients, dy if ctx.needs_input_grad[4] else None


def is_eager() -> bool:
    """Whether only autograd stands between a call and the CPU: no transform, tracer or mode."""
    return not (
        are_transforms_active() or count_dispatch_modes() or is_tracing() or forward_ad._current_level >= 0
    )


def _train_below(*args: Any) -> Any:
    with BelowAutograd():
        return TRAIN(*args)


def _infer_below(*args: Any) -> Any:
    with BelowAutograd():
        return INFER(*args)


def train(kernel: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
    """Call the kernel of train with a graph where one is wanted; eager code gives the CPU kernel."""
    tensors = args[:4]
    needs_graph = _needs_graph(*tensors)
    result = BatchNormTrain.apply(kernel, *tensors, args[4:]) if needs_graph else kernel(*args)
    return cast(tuple[Tensor, Tensor], result)


def infer(kernel: Callable[..., Any], *args: Any) -> Tensor:
    """Call the kernel of infer with a graph where one is wanted; eager code gives the CPU kernel."""
    tensors = args[:4]
    needs_graph = _needs_graph(*tensors)
    return cast(Tensor, BatchNormInfer.apply(kernel, *tensors, args[4:]) if needs_graph else kernel(*args))


def backward(*args: Any) -> Gradients:
    """Call the operator backward, with a graph of its own where wanted (`create_graph=True`)."""
    if _needs_graph(*args[:4]) or are_transforms_active():
        return _train_gradients(*args)
    with BelowAutograd():
        return cast(Gradients, BACKWARD(*args))


def infer_backward(*args: Any) -> Gradients:
    """Call the operator infer_backward, with a graph of its own where wanted (`create_graph=True`)."""
    if _needs_graph(*args[:4]) or are_transforms_active():
        return _infer_gradients(*args)
    with BelowAutograd():
        return cast(Gradients, INFER_BACKWARD(*args))


backward_cpu: Final = _gradients_cpu(HOST.backward, _train_gradients)
infer_backward_cpu: Final = _gradients_cpu(HOST.infer_backward, _infer_gradients)
_KERNELS: Final[list[tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]]] = [
    ("train", train_cpu, _train_fake, partial(train, _train_below)),
    ("infer", infer_cpu, _infer_fake, partial(infer, _infer_below)),
    ("backward", backward_cpu, _gradients_fake, backward),
    ("infer_backward", infer_backward_cpu, _gradients_fake, infer_backward),
]
for _name, _cpu, _fake, _autograd in _KERNELS:
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _autograd, "Autograd")
    register_fake(f"batchnorm::{_name}", _fake, lib=LIBRARY)
