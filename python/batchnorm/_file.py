"""The file of a frozen layer; `docs/format.md` is the specification."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from batchnorm._atomic import replacing
from batchnorm.frozen import FrozenBatchNorm

METADATA_KEYS = ("format", "version", "channel_axis", "eps", "dtype", "fingerprint")
_FORMAT = "batchnorm-frozen"
_VERSION = "1"
_TENSORS = ("gamma", "beta", "mean", "var")
_CODES = {"float32": "F32", "float64": "F64"}


def metadata(layer: FrozenBatchNorm) -> dict[str, str]:
    """What stands beside the tensors, in a file as in an ONNX model: one canonical text for each value."""
    axis, eps = str(layer.channel_axis), layer.eps.hex()
    values = (_FORMAT, _VERSION, axis, eps, layer.dtype.name, layer.fingerprint)
    return dict(zip(METADATA_KEYS, values, strict=True))


def check_known(where: str, found: Mapping[str, str]) -> None:
    """Refuses, by ValueError, metadata that is not of a frozen layer or is of a version not known here."""
    for key, known in (("format", _FORMAT), ("version", _VERSION)):
        if found.get(key) != known:
            raise ValueError(f"{where}: a frozen layer of {key} {known!r} wanted, found {found.get(key)!r}")
    if sorted(found) != sorted(METADATA_KEYS):
        wanted, there = ", ".join(METADATA_KEYS), ", ".join(sorted(found))
        raise ValueError(f"{where}: metadata {wanted} wanted, found {there}")


def restore(
    where: str, found: Mapping[str, str], parameters: Mapping[str, Any], eps: float
) -> FrozenBatchNorm:
    """The layer of these parameters, which must be the one that the metadata beside them describes.

    Nothing may have been lost by rounding, and all of the metadata is computed again from the layer and
    compared, so that no value is wrong unnoticed.

    Raises:
        ValueError: names `where` and what is wrong.
    """
    try:
        axis, dtype = int(found["channel_axis"]), found["dtype"]
        layer = FrozenBatchNorm(**parameters, eps=eps, channel_axis=axis, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: damaged: {error}") from error
    for name, value in {**parameters, "eps": eps}.items():
        if not np.array_equal(getattr(layer, name), value):
            raise ValueError(f"{where}: damaged: {name} is finer than {dtype}")
    for key, value in metadata(layer).items():
        if found[key] != value:
            raise ValueError(f"{where}: damaged: {key} is {found[key]!r}, but the rest makes it {value!r}")
    return layer


def read(path: str | os.PathLike[str]) -> FrozenBatchNorm:
    """Reads a file; `FrozenBatchNorm.load` documents it."""
    where = os.fspath(path)
    Path(where).open("rb").close()  # says better than safetensors why a file cannot be read
    try:
        with safe_open(where, framework="np") as file:
            found = file.metadata() or {}
            check_known(where, found)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{where}: not a whole safetensors file: {error}") from error

    kinds = {(values.dtype.name, values.ndim, values.size) for values in tensors.values()}
    if sorted(tensors) != sorted(_TENSORS) or len(kinds) != 1 or min(kinds)[:2] != (found["dtype"], 1):
        wanted = f"{', '.join(_TENSORS)} of {found['dtype']} and shape (channels,)"
        there = ", ".join(f"{name} {values.dtype}{values.shape}" for name, values in sorted(tensors.items()))
        raise ValueError(f"{where}: {wanted} wanted, found {there or 'no tensors'}")
    try:
        eps = float.fromhex(found["eps"])
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: damaged: eps is {found['eps']!r}, not a hexadecimal float") from error
    return restore(where, found, tensors, eps)


def encode(layer: FrozenBatchNorm) -> bytes:
    """The bytes of the file.

    The header is written here and not by the safetensors package, which orders metadata by a random hash: the
    same layer is to make the same bytes.
    """
    stored = layer.dtype.newbyteorder("<")
    tensors = {name: getattr(layer, name).astype(stored).tobytes() for name in _TENSORS}
    header: dict[str, Any] = {"__metadata__": metadata(layer)}
    for k, (name, data) in enumerate(tensors.items()):
        offsets = [k * len(data), (k + 1) * len(data)]
        header[name] = {"dtype": _CODES[layer.dtype.name], "shape": [layer.channels], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


def write(layer: FrozenBatchNorm, path: str | os.PathLike[str]) -> None:
    """Writes a file, whole or not at all; `FrozenBatchNorm.save` documents it."""
    with replacing(Path(path)) as file:
        file.write(encode(layer))
