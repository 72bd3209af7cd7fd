"""Frozen layers put back into the ONNX model that they came from."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import onnx

from batchnorm._checks import of_channels
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.onnx.edit import Editor, narrowed
from batchnorm.onnx.fingerprints import renew_fingerprints
from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.normalizations import PARAMETERS, Reading, normalizations, read


def replace_layers(
    model: ModelSource,
    layers: Mapping[str, FrozenBatchNorm],
    *,
    out: str | os.PathLike[str] | None = None,
) -> onnx.ModelProto:
    """Return a copy of a model in which batch normalizations have the parameters of other layers.

    Nothing else changes. A parameter that is equal to the old one keeps its bytes, and one that is an
    initializer read by this node alone is changed in place. Otherwise the node gets a new initializer, named
    `<old name>/<name of the node>`. Parameters are rounded to the type that the model holds them in.
    Fingerprints in the metadata that the exports of this package have written are renewed, or removed.

    Args:
        model: The model, its path, or its bytes.
        layers: Layers by the names that `frozen_layers` gives them; other nodes stay as they are.
        out: File to write the result to. If the model has data in other files, they are copied to one beside
            it, `<out>.data`. A model of more than 2 GB needs this argument, and its path as `model`.

    Returns:
        The changed copy.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: A name is none of the model's layers, or a node cannot be read (see `frozen_layers`); or a
            layer has another number of channels or a channel axis other than 1; or a value does not fit into
            the model's type.
        TypeError: A layer is not a `FrozenBatchNorm`.
    """
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers: was {type(layers).__name__}, wanted a mapping of names to layers")
    graph = Graph(model)
    editor = Editor(graph)
    nodes = {entry.key: entry.node for entry in normalizations(editor.graph)}
    changed: list[str] = []
    for key, layer in layers.items():
        if not isinstance(layer, FrozenBatchNorm):
            raise TypeError(f"layers[{key!r}]: was {type(layer).__name__}, wanted a FrozenBatchNorm")
        if key not in nodes:
            there = ", ".join(map(repr, nodes)) or "none"
            raise ValueError(f"layers: {key!r} is no batch normalization of {graph.where}, which has {there}")
        old = read(editor.graph, nodes[key])
        if len(old.gamma) != layer.channels or layer.channel_axis != 1:
            found = f"{of_channels(layer.channels)} on axis {layer.channel_axis}"
            raise ValueError(f"layers[{key!r}]: {found}, wanted {len(old.gamma)} on axis 1")
        if _put(editor, nodes[key], old, layer, key):
            changed.append(key)
    editor.refresh()
    renew_fingerprints(editor.model, {key: read(editor.graph, nodes[key]).layer() for key in changed})
    return editor.finish(out)


def _put(editor: Editor, node: onnx.NodeProto, old: Reading, layer: FrozenBatchNorm, key: str) -> bool:
    """Write the parameters of a layer into a node of an editor's copy; return whether any differs."""
    changed = False
    for position, role in enumerate(PARAMETERS, start=1):
        before, values = getattr(old, role), getattr(layer, role).astype(np.float64)
        after = narrowed(role, values, before.dtype, f"{editor.graph.where}: {key!r}")
        if after.tobytes() != before.tobytes():
            editor.write(node, position, after, key)
            changed = True
    if old.eps != layer.eps:
        kept = [attribute for attribute in node.attribute if attribute.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("epsilon", layer.eps)])
        changed = True
    return changed
