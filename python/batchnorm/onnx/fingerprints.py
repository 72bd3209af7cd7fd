"""Fingerprints that exports of this package have put into a model's metadata, kept true."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import onnx

from batchnorm._file import BATCH_NORM
from batchnorm.frozen import FrozenBatchNorm


def renew_fingerprints(model: onnx.ModelProto, layers: Mapping[str, FrozenBatchNorm]) -> None:
    """Bring what our exports say of changed layers up to date, or remove it.

    The fingerprint of the one layer of a model is computed again. That of a node in a network is removed,
    since it may be of a layer on another axis.

    Args:
        model: The model, which is changed.
        layers: The changed layers as they are in the model now, by name.
    """
    properties = {prop.key: prop.value for prop in model.metadata_props}
    whole = properties.keys() >= {*BATCH_NORM.keys} and properties["format"] == BATCH_NORM.format
    of_nodes = {f"batchnorm.{key}.fingerprint" for key in layers}
    for prop in [*model.metadata_props]:
        if prop.key == "fingerprint" and whole and len(layers) == 1:
            (layer,) = layers.values()
            axis, dtype = properties["channel_axis"], properties["dtype"]
            arrays = (layer.mean, layer.var, layer.gamma, layer.beta)
            # Other entries that are damaged stay so: `load_frozen` tells of them.
            with contextlib.suppress(TypeError, ValueError):
                new = FrozenBatchNorm(*arrays, eps=layer.eps, channel_axis=int(axis), dtype=dtype)
                prop.value = new.fingerprint
        elif prop.key in of_nodes:
            model.metadata_props.remove(prop)
