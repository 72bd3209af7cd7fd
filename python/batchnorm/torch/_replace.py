"""`replace` puts our layers into a model, `restore` takes them out again."""

from __future__ import annotations

from typing import Final, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from batchnorm.torch import _fused
from batchnorm.torch._fuse import Outcome
from batchnorm.torch._fuse import fuse as fuse_model
from batchnorm.torch._layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch._report import LayerReport, Report

_OURS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_THEIRS: Final = {ours: theirs for theirs, ours in _OURS.items()}


_Model = TypeVar("_Model", bound=nn.Module)


def replace(model: _Model, *, fuse: bool = True) -> tuple[_Model, Report]:
    """Make every batch norm of a model one of this package, in place.

    The layers stay the same objects, with their parameters, buffers, hooks, modes and names; only their class
    changes. Layers of exactly `torch.nn.BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` are replaced; of all
    others the report says why not. `restore` is the way back.

    With `fuse`, a batch norm computes what follows it in the same pass: ReLU or ReLU6, the addition of a
    residual, or an addition and then ReLU or ReLU6. For that the forward of the module that calls it is
    recorded by `torch.fx`, and the recording runs in its place, as long as the module is as it was then: if
    attributes that forward reads have other values, or hooks were added to these layers, the module's own
    forward runs. What cannot be recorded safely is left as it is, and the report says why. The class of a
    module with such a recording becomes a subclass of the same name. The layers themselves remain plain: they
    have no activation of their own.

    Args:
        model: The model; a batch norm by itself is one, too.
        fuse: Whether to fuse.

    Returns:
        The model, which is the same object, and the report.

    Raises:
        TypeError: model is not a `torch.nn.Module`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model, report = replace(model)
        >>> report["1"].fused
        'relu'
    """
    names = _names(model)
    kinds: dict[nn.Module, tuple[str, str]] = {}
    for module in names:
        _fused.remove(module)
        if isinstance(module, _BatchNorm):
            kinds[module] = type(module).__name__, _obstacle(module)
            if not kinds[module][1] and type(module) in _OURS:
                module.__class__ = _OURS[type(module)]  # type: ignore[assignment]
                module.__dict__["activation"] = None
    outcomes = fuse_model(names) if fuse else {}
    layers = []
    for module, (kind, obstacle) in kinds.items():
        outcome = outcomes.get(module, Outcome("", "")) if not obstacle else Outcome("", obstacle)
        layers.append(LayerReport(names[module][0], kind, not obstacle, outcome.fused, outcome.reason))
    return model, Report(tuple(layers))


def restore(model: _Model) -> _Model:
    """Make every batch norm of this package in a model PyTorch's again, and every forward its own, in place.

    This is what PyTorch's tools want that read the layers of a model, such as quantization.
    `SyncBatchNorm` is left as it is.

    Args:
        model: The model.

    Returns:
        The same object.

    Raises:
        TypeError: model is not a `torch.nn.Module`.
        ValueError: A layer was made with an activation, which PyTorch's cannot hold; nothing is changed then.
    """
    names = _names(model)
    active = [
        name[0]
        for module, name in names.items()
        if getattr(module, "activation", None) and type(module) in _THEIRS
    ]
    if active:
        raise ValueError(f"model: PyTorch's layers have no activation, but these have: {', '.join(active)}")
    for module in names:
        _fused.remove(module)
        if type(module) in _THEIRS:
            module.__class__ = _THEIRS[type(module)]
            module.__dict__.pop("activation", None)
    return model


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return all modules of the model with all their names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: was {type(model).__name__}, wanted a torch.nn.Module")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _obstacle(module: nn.Module) -> str:
    """Return why a batch norm cannot be replaced; "" if it can, or is ours already."""
    if type(module) in _THEIRS:
        return ""
    if isinstance(module, LazyModuleMixin):
        return "it is lazy: run the model once before"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if type(module) not in _OURS:
        return "it is not exactly a torch.nn.BatchNorm1d, BatchNorm2d or BatchNorm3d"
    if "forward" in module.__dict__:
        return "its forward is patched"
    return ""
