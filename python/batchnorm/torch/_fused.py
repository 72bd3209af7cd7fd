"""Modules whose forward gives batch norms the addition or activation that follows them.

A fused module is of a subclass, made here, of the class that it had, with another `forward` and a plan in its
`__dict__`. The layers themselves stay plain: the activation is an argument of the call, not a state of the
layer. So a layer that is called, hooked or taken by anybody else is what it seems to be, and at each call the
plan is checked: if a layer has hooks by now, or the model was changed, the original forward runs instead.
"""

from __future__ import annotations

import copyreg
import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final, Generic

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as _module

from batchnorm.torch._layers import Layer

PLAN: Final = "_batchnorm_plan"
ORIGINAL: Final = "_batchnorm_original"
ACTIVATIONS: Final[dict[Any, str]] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the class that it had before it was fused."""
    cls: type[nn.Module] = getattr(type(module), ORIGINAL, type(module))
    return cls


def is_sequential(module: object) -> bool:
    """Whether a module runs its children one after the other, as `nn.Sequential` does."""
    return isinstance(module, nn.Sequential) and original_class(module).forward is nn.Sequential.forward


def untouched(module: nn.Module) -> bool:
    """Whether nobody listens to the calls of a module: it has no hooks and no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def last(module: nn.Module) -> nn.Module | None:
    """Return the batch norm of ours that computes the output of a module, if one does.

    It is the module itself, or the last child of a sequential one.
    """
    while is_sequential(module) and untouched(module) and len(module._modules):
        child = list(module._modules.values())[-1]
        if child is None:
            return None
        module = child
    # A subclass with a forward of its own, as SyncBatchNorm is, must be called by it.
    plain = isinstance(module, Layer) and type(module).forward is Layer.forward and module.activation is None
    return module if plain and untouched(module) else None


def run(
    module: nn.Module, x: Tensor, residual: Any, activation: str | None, in_place: bool = False
) -> Tensor:
    """Call a module that ends in a batch norm, add the residual, apply the activation.

    Args:
        module: One for which `last` finds a layer.
        x: Its input.
        residual: What is added, or None.
        activation: "relu", "relu6" or None.
        in_place: Whether the addition was `+=`.
    """
    while not isinstance(module, Layer):
        steps = _steps(module)
        x, module = _run_steps(steps[:-1], x), steps[-1][0]
    if residual is None or _like(residual, x):
        return module._run(x, residual, activation)
    # Broadcasting and promotion are PyTorch's.
    y = module._run(x, None, None)
    y = y.add_(residual) if in_place else torch.add(y, residual)
    return _activate(y, activation)


def _watched() -> bool:
    """Whether somebody listens to the calls of all modules: a global hook, or a trace for TorchScript."""
    return torch.jit.is_tracing() or bool(_module._has_any_global_hook())  # type: ignore[no-untyped-call, attr-defined]


def _like(residual: Any, x: Tensor) -> bool:
    return isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    return nn.functional.relu(y) if activation == "relu" else nn.functional.relu6(y)


def _steps(module: nn.Module) -> list[tuple[nn.Module, str | None]]:
    """Return the children of a sequential module, with the activations that are fused into them."""
    plan = module.__dict__.get(PLAN)
    pairs: tuple[str, ...] = () if plan is None else plan.pairs
    steps: list[tuple[nn.Module, str | None]] = []
    opened = False
    for name, step in module._modules.items():
        assert step is not None
        if opened:
            activation, before = ACTIVATIONS.get(type(step)), steps[-1][0]
            if activation is not None and untouched(step) and last(before) is not None:
                steps[-1], opened = (before, activation), False
                continue
        steps.append((step, None))
        opened = name in pairs
    return steps


def _run_steps(steps: list[tuple[nn.Module, str | None]], x: Tensor) -> Tensor:
    for step, activation in steps:
        x = step(x) if activation is None else run(step, x, None, activation)
    return x


class SequentialPlan:
    """The batch norms of a sequential module whose activation follows.

    Args:
        pairs: Names of the children that end in a batch norm and are followed by an activation.
    """

    def __init__(self, pairs: tuple[str, ...]) -> None:
        self.pairs = pairs

    def __call__(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the module, or its original forward where the call is not as planned."""
        if kwargs or len(args) != 1 or isinstance(args[0], Proxy) or _watched():
            return original(module, *args, **kwargs)
        return _run_steps(_steps(module), args[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> SequentialPlan:
        return self  # it never changes

    def __reduce__(self) -> tuple[Any, ...]:
        return SequentialPlan, (self.pairs,)


class Variant:
    """A forward recorded by `torch.fx`, and the conditions under which it is that of the module.

    Args:
        source: Python source of a function `forward(self, ...)`.
        names: What the source refers to, beside what torch.fx always provides.
        arguments: The number of arguments.
        kind: The type of the arguments that the recording holds for; None for any.
        sites: For each fused call the path of the layer, and that of its activation, or None.
        used: Paths of all modules that the forward calls.
        containers: Paths of the containers that were read, with the names of their children.
        state: Paths of modules, names of attributes, and the values that the recording holds for.
    """

    def __init__(
        self,
        source: str,
        names: dict[str, Any],
        arguments: int,
        kind: type | None,
        sites: tuple[tuple[tuple[str, ...], tuple[str, ...] | None, str | None], ...],
        used: tuple[tuple[str, ...], ...],
        containers: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...],
        state: tuple[tuple[tuple[str, ...], str, Any], ...],
    ) -> None:
        self._parts = (source, names, arguments, kind, sites, used, containers, state)
        self._arguments, self._kind, self._sites = arguments, kind, sites
        self._used, self._containers, self._state = used, containers, state
        self._forward = compiled(source, names)

    def fits(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the recording is what the module does with these arguments."""
        return self._takes(args) and self._holds(module)

    def run(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Do what was recorded."""
        return self._forward(module, *args)

    def _takes(self, args: tuple[Any, ...]) -> bool:
        if len(args) != self._arguments:
            return False
        for value in args:
            if value is None or isinstance(value, Proxy):
                return False
            if self._kind is not None and not isinstance(value, self._kind):
                return False
        return True

    def _holds(self, module: nn.Module) -> bool:
        for path in self._used:
            if child(module, path) is None:
                return False
        for path, names in self._containers:
            container = child(module, path)
            if container is None or tuple(container._modules) != names:
                return False
        for path, name, value in self._state:
            owner = child(module, path)
            now = getattr(owner, name, self)
            if type(now) is not type(value) or now != value:
                return False
        for path, follower, activation in self._sites:
            layer = child(module, path)
            if layer is None or last(layer) is None:
                return False
            if follower is not None:
                relu = child(module, follower)
                if relu is None or ACTIVATIONS.get(type(relu)) != activation or not untouched(relu):
                    return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return Variant, self._parts


class TracedPlan:
    """What a module does, recorded by `torch.fx`.

    Args:
        variants: One recording for each type of arguments.
    """

    def __init__(self, variants: tuple[Variant, ...]) -> None:
        self._variants = variants

    def __call__(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the module, or its original forward where the call or the module is not as planned."""
        if not kwargs and not _watched():
            for variant in self._variants:
                if variant.fits(module, args):
                    return variant.run(module, args)
        return original(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedPlan:
        return self  # it never changes

    def __reduce__(self) -> tuple[Any, ...]:
        return TracedPlan, (self._variants,)


def child(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """Return the module at a path, or None where there is none."""
    found: nn.Module | None = module
    for name in path:
        if found is None:
            return None
        found = found._modules.get(name)
    return found


def compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """Return the function `forward` that the source defines."""
    provided = {
        "torch": torch,
        "device": torch.device,
        "inf": math.inf,
        "nan": math.nan,
        "NoneType": type(None),
    }
    space: dict[str, Any] = {**provided, **names}
    exec(compile(source, "<fused forward>", "exec"), space)
    function: Callable[..., Any] = space["forward"]
    return function


_NEW: Final = copyreg.__newobj__  # type: ignore[attr-defined]
_CLASSES: Final[dict[Any, Any]] = {}


def fused_class(cls: Any) -> Any:
    """Return the subclass of `cls` whose forward follows the plan of its instance; always the same one."""
    if cls not in _CLASSES:
        _CLASSES[cls] = _made(cls)
    return _CLASSES[cls]


def _made(cls: Any) -> Any:

    own, plan_key = cls.forward, PLAN

    def follow(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(plan_key)
        if plan is None:  # made from this class by someone else, as a slice of a Sequential is
            return own(self, *args, **kwargs)
        return plan(self, own, args, kwargs)

    # With the names that its own forward sees: TorchScript reads that one's source instead.
    names = getattr(own, "__globals__", globals())
    forward = functools.wraps(own)(FunctionType(follow.__code__, names, "forward", None, follow.__closure__))

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: N807
        # The class is made again where the pickle is loaded.
        reduced: Any = cls.__reduce_ex__(self, protocol)
        if reduced[0] is _NEW and reduced[1][0] is type(self):
            return _new, (cls, *reduced[1][1:]), *reduced[2:]
        return reduced

    body = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        ORIGINAL: cls,
    }
    return type(cls)(cls.__name__, (cls,), body)


def _new(cls: type[nn.Module], *args: Any) -> nn.Module:
    fused = fused_class(cls)
    module: nn.Module = fused.__new__(fused, *args)
    return module


def can_be_fused(module: nn.Module) -> bool:
    """Whether a subclass of the module's class can be made without anybody noticing."""
    known = (object, Generic)
    return not any("__init_subclass__" in vars(cls) for cls in type(module).__mro__ if cls not in known)


def install(module: nn.Module, plan: SequentialPlan | TracedPlan) -> None:
    """Make a module follow a plan."""
    module.__dict__[PLAN] = plan
    module.__class__ = fused_class(type(module))


def remove(module: nn.Module) -> None:
    """Give a fused module its own forward back."""
    module.__dict__.pop(PLAN, None)
    if hasattr(type(module), ORIGINAL):
        module.__class__ = original_class(module)
