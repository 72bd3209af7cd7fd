"""Functions on all batch norms of a model: `freeze` and `recompute_population`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import Algorithm2, FrozenBatchNorm, moments

_NARROW = (torch.float16, torch.bfloat16)


def freeze(model: nn.Module) -> dict[str, FrozenBatchNorm]:
    """Return the frozen layer of each batch norm of a model, by its name in the model.

    They compute what the layers compute in evaluation: parameters and ε are rounded once, as
    `FrozenBatchNorm` says. The layers of a model that `replace` has fused are plain, and so is what is
    returned: the addition or activation is part of the module that calls them.

    Args:
        model: The model, with PyTorch's layers or ours.

    Returns:
        The layers by name; the first name, if a layer has several. They have float64 parameters if the
        layer has.

    Raises:
        TypeError: model is not a `torch.nn.Module`.
        ValueError: A layer has an activation of its own, no running statistics, or values that no frozen
            layer can have; the message names it.
    """
    frozen = {}
    for name, layer in _batch_norms(model).items():
        if activation := getattr(layer, "activation", None):
            raise ValueError(
                f"model: {_called(name)} applies {activation!r}, and a frozen layer holds no activation; "
                f"call the frozen layer with it: frozen(x, activation={activation!r})"
            )
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"model: {_called(name)} has no running statistics to freeze")
        state = {key: _array(values) for key, values in layer.state_dict().items()}
        try:
            frozen[name] = FrozenBatchNorm.from_torch(state, eps=layer.eps)
        except ValueError as error:
            raise ValueError(f"model: {_called(name)}: {error}") from error
    return frozen


def recompute_population(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layerwise: bool = False,
) -> tuple[str, ...]:
    """Replace the running statistics of all batch norms by those of the batches, by Algorithm 2 of the paper.

    For each layer E[x] = Σ m·μ / Σ m and Var[x] = Σ M2 / Σ (m − 1) over the batches, in float64, rounded to
    the dtype of the buffers (Ioffe and Szegedy 2015, Algorithm 2, step 10, weighted by the number of values).
    No gradients are computed. All modules but the batch norms are in evaluation mode meanwhile, as they are
    when the statistics are used: dropout does not change them.

    Args:
        model: The model, with PyTorch's batch norms or ours.
        batches: Batches of training data. With `layerwise` they are read once for each layer, so they must be
            a list, a DataLoader or the like.
        forward: Called as `forward(model, batch)` to run the model; by default `model(batch)`, or
            `model(batch[0])` where a batch is a tuple or a list, as a DataLoader gives it with labels.
        layerwise: False: in one pass all layers normalize by the statistics of the batch. True: layer after
            layer, in the order in which they run, each on inputs that the layers before it compute with
            their new statistics, as they will in evaluation.

    Returns:
        The names of the layers whose statistics were replaced: those that ran and have running statistics.

    Raises:
        TypeError: model is not a `torch.nn.Module`, or `layerwise` has batches that can be read only once.
        ValueError: There is no batch, a layer is a SyncBatchNorm, or a batch has fewer than 2 values in a
            channel or statistics that are not finite. Whatever is raised, the statistics are as before.
    """
    layers = {name: layer for name, layer in _batch_norms(model).items() if layer.running_mean is not None}
    for name, layer in layers.items():
        if "SyncBatchNorm" in type(layer).__name__:
            raise ValueError(
                f"model: {_called(name)} is a {type(layer).__name__}, whose batch is on several processes"
            )
    if layerwise and iter(batches) is batches:
        raise TypeError(
            f"batches: was {type(batches).__name__}, which can be read only once, and layerwise wanted more"
        )
    run = forward or _run
    before = {name: _statistics(layer) for name, layer in layers.items()}
    try:
        with _evaluating(model), torch.no_grad():
            if layerwise:
                found = _layer_by_layer(model, layers, batches, run)
            else:
                for layer in layers.values():
                    # Normalizes by the batch, and leaves the running statistics alone.
                    layer.training, layer.track_running_stats = True, False
                found = _collected(model, layers, batches, run)
                for name, population in found.items():
                    _enter(layers[name], population)
    except BaseException:
        for name, (mean, var) in before.items():
            _write(layers[name], mean, var)
        raise
    return tuple(found)


def _run(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: was {type(model).__name__}, wanted a torch.nn.Module")
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _called(name: str) -> str:
    return f"layer {name!r}" if name else "the layer"


def _array(values: Tensor) -> Any:
    values = values.detach().cpu()
    return (values.float() if values.dtype in _NARROW else values).numpy()


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.clone(), layer.running_var.clone()


def _write(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    with torch.no_grad():
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


def _enter(layer: _BatchNorm, population: Algorithm2) -> None:
    _write(layer, torch.from_numpy(population.mean), torch.from_numpy(population.var))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and back, together with what `recompute_population` changes."""
    modes = [
        (module, module.training, getattr(module, "track_running_stats", None)) for module in model.modules()
    ]
    try:
        for module, _, _ in modes:
            module.training = False
        yield
    finally:
        for module, training, track in modes:
            module.training = training
            if track is not None:
                module.track_running_stats = track


def _collected(
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
) -> dict[str, Algorithm2]:
    """Run the model on all batches; return the statistics of the layers' inputs, in the order of running."""
    populations: dict[str, Algorithm2] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            x = arguments[0] if arguments else options["input"]
            try:
                populations.setdefault(name, Algorithm2()).update(moments(_array(x)))
            except ValueError as error:
                raise ValueError(f"batches: at {_called(name)}: {error}") from error

        return hook

    handles = [
        layer.register_forward_pre_hook(listen(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        count = 0
        for batch in batches:
            run(model, batch)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("batches: 1 or more wanted, found none")
    return populations


def _layer_by_layer(
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
) -> dict[str, Algorithm2]:
    found: dict[str, Algorithm2] = {}
    # A first pass over one batch tells the order.
    for name in _collected(model, layers, islice(batches, 1), run):
        found |= _collected(model, {name: layers[name]}, batches, run)
        _enter(layers[name], found[name])
    return found
