"""Files of frozen layers; `docs/format.md` is the specification."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from batchnorm._atomic import replacing
from batchnorm._types import FrozenLayer


class Kind(NamedTuple):
    """The contents of a file of one kind of layer."""

    format: str
    version: str
    tensors: tuple[str, ...]


BATCH_NORM = Kind("batchnorm-frozen", "1", ("gamma", "beta", "mean", "var"))

METADATA_KEYS = ("format", "version", "channel_axis", "eps", "dtype", "fingerprint")
_Layer = TypeVar("_Layer", bound=FrozenLayer)
_CODES = {"float32": "F32", "float64": "F64"}


def metadata(layer: FrozenLayer, kind: Kind = BATCH_NORM) -> dict[str, str]:
    """Return the metadata of a file or an ONNX model: each value as its one canonical text."""
    axis, eps = str(layer.channel_axis), layer.eps.hex()
    values = (kind.format, kind.version, axis, eps, layer.dtype.name, layer.fingerprint)
    return dict(zip(METADATA_KEYS, values, strict=True))


def check_known(where: str, found: Mapping[str, str], kind: Kind = BATCH_NORM) -> None:
    """Raise ValueError if the metadata is not of this kind of layer, or is of an unknown version."""
    for key, known in (("format", kind.format), ("version", kind.version)):
        if found.get(key) != known:
            raise ValueError(f"{where}: a frozen layer of {key} {known!r} wanted, found {found.get(key)!r}")
    if sorted(found) != sorted(METADATA_KEYS):
        wanted, there = ", ".join(METADATA_KEYS), ", ".join(sorted(found))
        raise ValueError(f"{where}: metadata {wanted} wanted, found {there}")


def restore(
    make: Callable[..., _Layer],
    where: str,
    found: Mapping[str, str],
    parameters: Mapping[str, Any],
    eps: float,
    kind: Kind = BATCH_NORM,
) -> _Layer:
    """Make the layer with these parameters, and check that it is the one that the metadata describes.

    Rounding must not change a parameter. All metadata is computed again from the layer and compared, so that
    no wrong value goes unnoticed.

    Args:
        make: Class of the layer.
        where: Name of the file or model in errors.
        found: The metadata, already checked by `check_known`.
        parameters: The tensors by name.
        eps: ε.
        kind: Kind of the layer.

    Raises:
        ValueError: A parameter or a metadata value is wrong; the message names `where`.
    """
    try:
        axis, dtype = int(found["channel_axis"]), found["dtype"]
        layer = make(**parameters, eps=eps, channel_axis=axis, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: damaged: {error}") from error
    for name, value in {**parameters, "eps": eps}.items():
        if not np.array_equal(getattr(layer, name), value):
            raise ValueError(f"{where}: damaged: {name} is not rounded as the format requires")
    for key, value in metadata(layer, kind).items():
        if found[key] != value:
            raise ValueError(f"{where}: damaged: {key} is {found[key]!r}, but that of the layer is {value!r}")
    return layer


def read(make: Callable[..., _Layer], path: str | os.PathLike[str], kind: Kind = BATCH_NORM) -> _Layer:
    """Read a file and make its layer; `FrozenBatchNorm.load` documents it."""
    where = os.fspath(path)
    Path(where).open("rb").close()  # says better than safetensors why a file cannot be read
    try:
        with safe_open(where, framework="np") as file:
            found = file.metadata() or {}
            check_known(where, found, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{where}: not a whole safetensors file: {error}") from error

    kinds = {(values.dtype.name, values.ndim, values.size) for values in tensors.values()}
    if sorted(tensors) != sorted(kind.tensors) or len(kinds) != 1 or min(kinds)[:2] != (found["dtype"], 1):
        wanted = f"{', '.join(kind.tensors)} of {found['dtype']} and shape (channels,)"
        there = ", ".join(f"{name} {values.dtype}{values.shape}" for name, values in sorted(tensors.items()))
        raise ValueError(f"{where}: {wanted} wanted, found {there or 'no tensors'}")
    try:
        eps = float.fromhex(found["eps"])
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: damaged: eps is {found['eps']!r}, not a hexadecimal float") from error
    return restore(make, where, found, tensors, eps, kind)


def encode(layer: FrozenLayer, kind: Kind = BATCH_NORM) -> bytes:
    """Return the bytes of the file.

    The header is written here and not by the safetensors package: that orders metadata by a random hash, but
    the same layer must always make the same bytes.
    """
    stored = layer.dtype.newbyteorder("<")
    tensors = {name: getattr(layer, name).astype(stored).tobytes() for name in kind.tensors}
    header: dict[str, Any] = {"__metadata__": metadata(layer, kind)}
    for k, (name, data) in enumerate(tensors.items()):
        offsets = [k * len(data), (k + 1) * len(data)]
        header[name] = {"dtype": _CODES[layer.dtype.name], "shape": [layer.channels], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


def write(layer: FrozenLayer, path: str | os.PathLike[str], kind: Kind = BATCH_NORM) -> None:
    """Write a file, whole or not at all; `FrozenBatchNorm.save` documents it."""
    with replacing(Path(path)) as file:
        file.write(encode(layer, kind))
