"""Recording the forward of one module by `torch.fx`, or saying why that is not safe.

A recording is one run of forward with symbols for tensors: what forward decides by anything but its tensors
is decided once. So everything that it reads meanwhile is watched. Attributes that are numbers, text or None
become conditions of the recording; what cannot be a condition ends it.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import operator
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import fx, nn

_SCALARS: Final = (bool, int, float, str, type(None), torch.dtype, torch.device)
_CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_FORBIDDEN: Final = {
    "type",
    "hasattr",
    "callable",
    "vars",
    "globals",
    "locals",
    "eval",
    "exec",
    "print",
    "id",
    "open",
    "input",
}
_MODULES: Final = ("torch", "math", "operator", "typing")
_IN_PLACE: Final = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
)
_LOCK: Final = threading.Lock()


class Refused(Exception):  # noqa: N818  (it says no, and is not an error of anybody)
    """Forward cannot be recorded; the text says why."""


class Recording:
    """The graph of a forward, and what it depends on.

    Attributes:
        graph: The graph; its placeholders are the arguments that have no default.
        state: Attributes that were read: the path of the module, the name, the value.
        containers: Containers that were read, with the names of their children.
        kind: The type that the arguments have to have, where forward asked for it.
    """

    def __init__(self, kind: type) -> None:
        self.graph = fx.Graph()
        self.state: dict[tuple[tuple[str, ...], str], Any] = {}
        self.containers: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.kind: type | None = None
        self.claimed = kind

    def text(self) -> str:
        """Return the graph as text, to be compared with others."""
        return str(self.graph)


class _Symbol(fx.Proxy):
    """A tensor of the recording. It tells when it is asked for its type."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind: type = self.tracer.asked_for_type(self, sys._getframe(1))  # type: ignore[attr-defined]
        return kind


def _in_place_method(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> Any:  # torch.fx itself records `a += b` as `a + b`
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(_Symbol, f"__{_name}__", _in_place_method(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise Refused("forward changes the mode of autograd or autocast, or keeps checkpoints")
        node = super().create_node(*args, **kwargs)
        node.type = None
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        arguments = [self.create_proxy("placeholder", name, (), {}) for name in _required(root_fn)]
        return root_fn, [self.root, *arguments]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if attr_val is None:
            raise Refused(f"forward reads {attr}, which is None")
        paths = self.submodule_paths or {}
        if isinstance(attr_val, _CONTAINERS) and attr_val in paths:
            path = split(paths[attr_val])
            self._recording.containers[path] = tuple(attr_val._modules)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def asked_for_type(self, symbol: fx.Proxy, frame: Any) -> type:
        if _of_torch(frame):
            return fx.Proxy
        if symbol.node.op != "placeholder":
            raise Refused("forward asks for the type of a tensor")
        self._recording.kind = self._recording.claimed
        return self._recording.claimed


def split(path: str) -> tuple[str, ...]:
    """Return the names in the path of a module."""
    return tuple(path.split(".")) if path else ()


def record(module: nn.Module, kind: type) -> Recording:
    """Record the forward of a module, with its children as single steps, in both modes.

    Args:
        module: The module; it is as before afterwards.
        kind: What the arguments claim to be if forward asks by `isinstance`.

    Raises:
        Refused: Forward cannot be recorded, or might do something else at another time.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        recordings = []
        with _unchanged_random_numbers():
            for training in (True, False):
                for part, _ in modes:
                    part.__dict__["training"] = training
                recordings.append(_record(module, kind))
    finally:
        for part, mode in modes:
            part.__dict__["training"] = mode
    first, second = recordings
    if (first.text(), first.state, first.containers) != (second.text(), second.state, second.containers):
        raise Refused("forward does different things in training and evaluation")
    return first


def _record(module: nn.Module, kind: type) -> Recording:
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        raise Refused("forward is not a Python function")
    _check_names(forward, set())
    recording = Recording(kind)
    if isinstance(module, _CONTAINERS):
        recording.containers[()] = tuple(module._modules)
    tracer = _Tracer(recording)
    try:
        with warnings.catch_warnings(), _watching(module, recording):
            warnings.simplefilter("ignore")
            recording.graph = tracer.trace(module)
    except Refused:
        raise
    except Exception as error:  # whatever forward raises where a tensor is a symbol
        reason = str(error).splitlines()
        raise Refused(
            f"torch.fx cannot trace forward: {reason[0] if reason else type(error).__name__}"
        ) from error
    for node in recording.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise Refused("forward makes tensors of its own")
    return recording


def _required(forward: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without defaults; those with one are not part of a recording."""
    names = []
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise Refused("forward has keyword arguments without defaults")
            names.append(name)
    return names


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
    )


def _of_torch(frame: Any) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "torch" or name.startswith("torch.") or name == __name__


def _random_numbers() -> tuple[Any, ...]:
    """Return the states of the three generators, as values that compare."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return (
        random.getstate(),
        (name, np.asarray(keys).tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )


@contextmanager
def _unchanged_random_numbers() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = _random_numbers()
    try:
        yield
        if _random_numbers() != before:
            raise Refused("forward draws random numbers")
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def _watching(root: nn.Module, recording: Recording) -> Iterator[None]:
    """Watch what forward reads and writes of the modules below `root`, in this thread."""
    paths = {id(part): split(path) for path, part in root.named_modules()}
    thread = threading.get_ident()
    write, delete = nn.Module.__setattr__, nn.Module.__delattr__

    def watched(module: nn.Module) -> bool:
        return threading.get_ident() == thread and id(module) in paths and not _of_torch(sys._getframe(2))

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if not name.startswith("__") and watched(module):
            _check_read(module, paths[id(module)], name, value, recording)
        return value

    def refuse_write(module: nn.Module, name: str, value: Any) -> None:
        if watched(module):
            raise Refused(f"forward writes self.{name}")
        write(module, name, value)

    def refuse_delete(module: nn.Module, name: str) -> None:
        if watched(module):
            raise Refused(f"forward deletes self.{name}")
        delete(module, name)

    with _LOCK:
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__ = refuse_write  # type: ignore[method-assign, assignment]
        nn.Module.__delattr__ = refuse_delete  # type: ignore[method-assign]
        try:
            yield
        finally:
            del nn.Module.__getattribute__  # that of `object` again
            nn.Module.__setattr__ = write  # type: ignore[method-assign]
            nn.Module.__delattr__ = delete  # type: ignore[method-assign]


def _check_read(
    module: nn.Module, path: tuple[str, ...], name: str, value: Any, recording: Recording
) -> None:
    if name == "training":
        raise Refused("forward reads self.training")
    if isinstance(value, MethodType):
        if isinstance(value.__func__, FunctionType) and value.__self__ is module:
            if _from_torch(value.__func__):
                if not isinstance(module, _CONTAINERS):
                    raise Refused(f"forward calls self.{name}")
            else:
                _check_names(value.__func__, set())
            return
    elif (
        isinstance(value, _SCALARS)
        or (isinstance(value, tuple) and all(isinstance(v, _SCALARS) for v in value))
        or (isinstance(value, FunctionType | BuiltinFunctionType) and _from_torch(value))
    ):
        recording.state[path, name] = value
        return
    elif isinstance(value, FunctionType) and name not in module.__dict__:  # a static method
        _check_names(value, set())
        return
    raise Refused(f"forward reads self.{name}, Python state of type {type(value).__name__}")


def _from_torch(value: Any) -> bool:
    name = getattr(value, "__module__", None) or ""
    return name == "torch" or name.startswith("torch.")


def _check_names(function: FunctionType, seen: set[Any]) -> None:
    """Refuse a function that reads anything which might be another at another time."""
    if function in seen:
        return
    seen.add(function)
    if function.__closure__:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            if name != "__class__":
                _check_value(name, cell.cell_contents, seen)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if not isinstance(value, _SCALARS):
            _check_value(f"the default {value!r}", value, seen)
    _check_code(function.__code__, function.__globals__, seen)


def _check_code(code: CodeType, names: dict[str, Any], seen: set[Any]) -> None:
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        outer = instruction.opname == "STORE_DEREF" and name in code.co_freevars
        if outer or instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"):
            raise Refused(f"forward changes or imports {name}")
        if name in ("__class__", "__dict__") and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            raise Refused(f"forward reads {name}")
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            if name in names:
                _check_value(name, names[name], seen)
            elif name in _FORBIDDEN or not hasattr(builtins, name):
                raise Refused(f"forward calls {name}")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _check_code(constant, names, seen)


def _check_value(name: str, value: Any, seen: set[Any]) -> None:
    if isinstance(value, ModuleType):
        allowed = value.__name__.split(".")[0] in _MODULES
    elif isinstance(value, type):
        allowed = _from_torch(value) or issubclass(value, nn.Module | torch.autograd.Function | BaseException)
    else:
        allowed = _from_torch(value) or getattr(value, "__module__", "") == "typing"
        if isinstance(value, FunctionType) and not allowed:
            _check_names(value, seen)
            return
    if not allowed:
        raise Refused(f"forward reads {name}, a name outside of it")
