"""Finding what follows the batch norms of a model, and fusing it into them."""

from __future__ import annotations

import _operator
import operator
from collections import Counter
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from batchnorm.torch import _fused
from batchnorm.torch._fused import (
    ACTIVATIONS,
    SequentialPlan,
    TracedPlan,
    Variant,
    child,
    is_sequential,
    last,
)
from batchnorm.torch._layers import Layer
from batchnorm.torch._trace import Recording, Refused, record, split

_RELU_FUNCTIONS: Final[dict[Any, str]] = {
    functional.relu: "relu",
    functional.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.relu6: "relu6",
}
_RELU_METHODS: Final = ("relu", "relu_")
_ADDITIONS: Final = {operator.add: False, torch.add: False, operator.iadd: True}  # whether in place
_ADD_METHODS: Final = {"add": False, "add_": True}
_FRESH: Final = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Modules whose output is memory of its own."""

NOTHING_FOLLOWS: Final = "no ReLU or addition follows it in the module that calls it"


class Outcome(NamedTuple):
    """What was fused into a layer, or why nothing was."""

    fused: str
    reason: str


def fuse(names: dict[nn.Module, list[str]]) -> dict[nn.Module, Outcome]:
    """Fuse what can be fused into the plain layers of a model.

    Args:
        names: All modules of the model, whose batch norms are ours, with all their names.

    Returns:
        The outcome for each of our layers.
    """
    outcomes: dict[nn.Module, Outcome] = {}
    for layer in names:
        if isinstance(layer, Layer):
            if len(names[layer]) > 1:
                outcomes[layer] = Outcome("", f"it stands in the model under {len(names[layer])} names")
            elif layer.activation is not None:
                outcomes[layer] = Outcome("", f"it has an activation already, {layer.activation!r}")
            elif not _fused.untouched(layer):
                outcomes[layer] = Outcome("", "it has hooks")
    # Children before parents: the smallest module that holds a pattern.
    for module in reversed(list(names)):
        open_layers = _open_layers(module, outcomes)
        if not open_layers:
            continue
        if "forward" in module.__dict__ or not _fused.can_be_fused(module):
            found = dict.fromkeys(
                open_layers, Outcome("", "the module that calls it is patched, or counts subclasses")
            )
        elif is_sequential(module):
            found = _fuse_sequential(module, open_layers)
        else:
            found = _fuse_traced(module, open_layers)
        # What is the output of a sequential module may still be fused where that is called.
        waiting = last(module)
        outcomes |= {
            layer: outcome for layer, outcome in found.items() if outcome.fused or layer is not waiting
        }
    rest = {layer for layer in names if isinstance(layer, Layer)} - set(outcomes)
    return outcomes | dict.fromkeys(rest, Outcome("", NOTHING_FOLLOWS))


def _open_layers(module: nn.Module, outcomes: dict[nn.Module, Outcome]) -> dict[nn.Module, str]:
    """Return the layers without an outcome that compute the output of a child, with the child's name."""
    found = {}
    for name, part in module._modules.items():
        layer = None if part is None else last(part)
        if layer is not None and layer not in outcomes:
            found[layer] = name
    return found


def _fuse_sequential(module: nn.Module, layers: dict[nn.Module, str]) -> dict[nn.Module, Outcome]:
    children = [(name, part) for name, part in module._modules.items() if part is not None]
    by_name = {name: layer for layer, name in layers.items()}
    pairs, outcomes = [], dict.fromkeys(layers, Outcome("", NOTHING_FOLLOWS))
    for (name, _), (_, following) in pairwise(children):
        if name in by_name and (activation := ACTIVATIONS.get(type(following))):
            if _fused.untouched(following):
                pairs.append(name)
                outcomes[by_name[name]] = Outcome(activation, "")
            else:
                outcomes[by_name[name]] = Outcome("", "the activation that follows it has hooks")
    if pairs:
        _fused.install(module, SequentialPlan(tuple(pairs)))
    return outcomes


def _fuse_traced(module: nn.Module, layers: dict[nn.Module, str]) -> dict[nn.Module, Outcome]:
    if isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
        return dict.fromkeys(layers, Outcome("", "the module that calls it is compiled by PyTorch"))
    recordings, refusal = [], ""
    try:
        recordings.append(record(module, Tensor))
        if recordings[0].kind is not None:  # what forward does depends on the type of its argument
            recordings.append(record(module, list))
    except Refused as reason:
        refusal = str(reason)
    outcomes: dict[nn.Module, Outcome] = {}
    variants = []
    for recording in recordings:
        variant, found = _variant(module, recording, layers)
        if variant is not None:
            variants.append(variant)
        outcomes = {
            layer: found[layer] if found[layer].fused else outcomes.get(layer, found[layer])
            for layer in found
        }
    if variants:
        _fused.install(module, TracedPlan(tuple(variants)))
    where = f" of {type(module).__name__}"
    missing = Outcome("", refusal.replace("forward", f"forward{where}", 1))
    return {layer: outcomes.get(layer, missing) for layer in layers}


class _Site(NamedTuple):
    """A place in a graph where a layer and what follows become one call."""

    call: fx.Node
    residual: fx.Node | None
    in_place: bool
    addition: fx.Node | None
    activation: str | None
    follower: fx.Node | None  # the node of the activation

    @property
    def fused(self) -> str:
        return ", ".join(filter(None, ("residual" if self.residual else "", self.activation)))


def _variant(
    module: nn.Module, recording: Recording, layers: dict[nn.Module, str]
) -> tuple[Variant | None, dict[nn.Module, Outcome]]:
    """Fuse what can be fused in a recording."""
    graph = recording.graph
    by_path = {name: layer for layer, name in layers.items()}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    used = tuple(split(str(target)) for target in calls)
    outcomes = {layer: Outcome("", "forward of the module does not call it by itself") for layer in layers}
    sites: list[tuple[tuple[str, ...], tuple[str, ...] | None, str | None]] = []
    # The last first: where two layers are added, the last one has nothing between it and the addition.
    for node in reversed(list(graph.nodes)):
        if node.op != "call_module" or node.target not in by_path:
            continue
        layer = by_path[node.target]
        if calls[node.target] > 1:
            outcomes[layer] = Outcome("", "it is called more than once")
            continue
        try:
            site = _site(module, graph, node)
        except Refused as reason:
            outcomes[layer] = Outcome("", str(reason))
            continue
        follower = None
        if site.follower is not None and site.follower.op == "call_module":
            follower = split(str(site.follower.target))
        _rewrite(graph, site)
        sites.append((split(str(node.target)), follower, site.activation))
        outcomes[layer] = Outcome(site.fused, "")
    if not sites:
        return None, outcomes
    graph.lint()
    code = graph.python_code("self")
    provided = ("torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree")
    names = {name: value for name, value in code.globals.items() if name not in provided}
    arguments = sum(node.op == "placeholder" for node in graph.nodes)
    state = tuple((path, name, value) for (path, name), value in recording.state.items())
    containers = tuple(recording.containers.items())
    variant = Variant(code.src, names, arguments, recording.kind, tuple(sites), used, containers, state)
    return variant, outcomes


def _site(module: nn.Module, graph: fx.Graph, call: fx.Node) -> _Site:
    """Return what can be fused with a call of a layer, or raise Refused saying why nothing can."""
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], fx.Node):
        raise Refused("it is called with other arguments than one tensor")
    following = _only_user(call)
    activation = _activation(module, following, call)
    if activation:
        return _Site(call, None, False, None, activation, following)
    in_place = _addition(following, call)
    residual = following.args[1] if following.args[0] is call else following.args[0]
    assert isinstance(residual, fx.Node)
    _check_order(module, graph, call, following)
    follower = _single(following)
    after = None if follower is None else _activation(module, follower, following)
    if after and not _changed_later(module, graph, residual, following):
        return _Site(call, residual, in_place, following, after, follower)
    return _Site(call, residual, in_place, following, None, None)


def _single(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _only_user(call: fx.Node) -> fx.Node:
    if not call.users:
        raise Refused("its output is not used")
    user = _single(call)
    if user is None:
        raise Refused("its output has another consumer")
    return user


def _activation(module: nn.Module, node: fx.Node, x: fx.Node) -> str | None:
    """Return the activation that a node applies to x alone, or None."""
    if node.op == "call_module":
        relu = child(module, split(str(node.target)))
        plain = node.args == (x,) and not node.kwargs and relu is not None and _fused.untouched(relu)
        return ACTIVATIONS.get(type(relu)) if plain and relu is not None else None
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if options or not node.args or node.args[0] is not x or any(arg is x for arg in node.args[1:]):
        return None
    if node.op == "call_function":
        return _RELU_FUNCTIONS.get(node.target)
    return "relu" if node.op == "call_method" and node.target in _RELU_METHODS else None


def _addition(node: fx.Node, x: fx.Node) -> bool:
    """Return whether the node adds a tensor to x in place, or raise Refused if it is no addition to x."""
    if node.target is _fused.run:
        raise Refused("the layer that it is added to makes the addition")
    kinds: Any = {"call_function": _ADDITIONS, "call_method": _ADD_METHODS}.get(node.op, {})
    if node.target not in kinds:
        raise Refused(NOTHING_FOLLOWS)
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        raise Refused("what is added to it is not a tensor alone")
    if node.args[0] is node.args[1]:
        raise Refused("it is added to itself")
    in_place: bool = kinds[node.target]
    if in_place and node.args[0] is not x:
        raise Refused("it is added in place to another tensor")
    return in_place


def _check_order(module: nn.Module, graph: fx.Graph, call: fx.Node, addition: fx.Node) -> None:
    """Refuse if the layer cannot be computed as late as where the addition stands."""
    nodes = list(graph.nodes)
    between = nodes[nodes.index(call) + 1 : nodes.index(addition)]
    if any(_writes(module, node) for node in between):
        raise Refused("a tensor is changed in place between it and the addition")
    layer = child(module, split(str(call.target)))
    if isinstance(layer, Layer):
        # What the layer reads is safe from functions that write nothing, and from modules if it alone has it.
        source = call.args[0]
        assert isinstance(source, fx.Node)
        maker = child(module, split(str(source.target))) if source.op == "call_module" else None
        if type(maker) in _FRESH and len(source.users) == 1:
            return
        between = [node for node in between if node.op == "call_module" or not _of_torch(node)]
    if any(node.op != "get_attr" for node in between):
        raise Refused("other modules run between it and the addition")


def _of_torch(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or ""
    return node.op != "call_function" or module.split(".")[0] in ("torch", "_operator", "builtins", "math")


def _changed_later(module: nn.Module, graph: fx.Graph, residual: fx.Node, addition: fx.Node) -> bool:
    """Whether the residual, which backward needs if an activation follows, is changed after the addition."""
    nodes = list(graph.nodes)
    later = nodes[nodes.index(addition) + 1 :]
    return any(residual in node.all_input_nodes and _writes(module, node, deep=True) for node in later)


def _writes(module: nn.Module, node: fx.Node, deep: bool = False) -> bool:
    """Whether a node may change a tensor in place; `deep`: also within the modules that it calls."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        called = child(module, split(str(node.target)))
        parts = [] if called is None else list(called.modules()) if deep else [called]
        return any(getattr(part, "inplace", False) for part in parts)
    if node.op != "call_function" or node.target is _fused.run:  # which adds in place to its own output only
        return False
    name = getattr(node.target, "__name__", "")
    in_place = (
        getattr(_operator, f"__{name}__", None) is node.target
        and name.startswith("i")
        and hasattr(_operator, name[1:])
    )
    flagged = any(value is True for value in (*node.args, *node.kwargs.values())) or "out" in node.kwargs
    return in_place or flagged or name.endswith("_") or name == "setitem"


def _rewrite(graph: fx.Graph, site: _Site) -> None:
    """Put one call in the place of a layer and what follows it."""
    place = site.addition or site.call
    end = site.follower or site.addition
    assert end is not None
    with graph.inserting_before(place):
        layer = graph.get_attr(str(site.call.target))
        arguments = (layer, site.call.args[0], site.residual, site.activation, site.in_place)
        fused = graph.call_function(_fused.run, arguments)
    end.replace_all_uses_with(fused)
    for node in (site.follower, site.addition, site.call):
        if node is not None:
            graph.erase_node(node)
