"""Files of frozen layers; `docs/format.md` is the specification."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from batchnorm._atomic import replacing
from batchnorm._types import FrozenLayer

_Layer = TypeVar("_Layer", bound=FrozenLayer)
_CODES = {"float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Kind:
    """The contents of a file of one kind of layer.

    Attributes:
        format: Name of the format.
        version: Version of the format.
        matrices: Names of the tensors of shape (channels, D).
        vectors: Names of the tensors of shape (channels,), which come after them in a file.
        numbers: Names of the parameters that the metadata hold.
    """

    format: str
    version: str
    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    numbers: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of a file."""
        return self.matrices + self.vectors

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the metadata, in the order of a file."""
        return ("format", "version", "channel_axis", *self.numbers, "dtype", "fingerprint")


BATCH_NORM = Kind("batchnorm-frozen", "1", (), ("gamma", "beta", "mean", "var"), ("eps",))
WHITENING = Kind("batchnorm-frozen-whitening", "1", ("matrix",), ("mean", "bias"), ())


def metadata(layer: FrozenLayer, kind: Kind) -> dict[str, str]:
    """Return the metadata of a file or an ONNX model: each value as its one canonical text."""
    numbers = [getattr(layer, name).hex() for name in kind.numbers]
    axis = str(layer.channel_axis)
    values = (kind.format, kind.version, axis, *numbers, layer.dtype.name, layer.fingerprint)
    return dict(zip(kind.keys, values, strict=True))


def kind_of(where: str, found: Mapping[str, str], kinds: Iterable[Kind]) -> Kind:
    """Return the kind of layer that the metadata belong to.

    Raises:
        ValueError: The metadata are of none of these kinds, or of an unknown version.
    """
    known = {kind.format: kind for kind in kinds}
    kind = known.get(found.get("format", ""))
    if kind is None:
        formats = " or ".join(map(repr, known))
        raise ValueError(f"{where}: a frozen layer of format {formats} wanted, found {found.get('format')!r}")
    if (version := found.get("version")) != kind.version:
        raise ValueError(f"{where}: a frozen layer of version {kind.version!r} wanted, found {version!r}")
    if sorted(found) != sorted(kind.keys):
        wanted, there = ", ".join(kind.keys), ", ".join(sorted(found))
        raise ValueError(f"{where}: metadata {wanted} wanted, found {there}")
    return kind


def restore(
    make: Callable[..., _Layer],
    where: str,
    found: Mapping[str, str],
    parameters: Mapping[str, Any],
    kind: Kind,
) -> _Layer:
    """Make the layer with these parameters, and check that it is the one that the metadata describes.

    Rounding must not change a parameter. All metadata is computed again from the layer and compared, so that
    no wrong value goes unnoticed.

    Args:
        make: Class of the layer.
        where: Name of the file or model in errors.
        found: The metadata, already checked by `kind_of`.
        parameters: Tensors and numbers by name.
        kind: Kind of the layer.

    Raises:
        ValueError: A parameter or a metadata value is wrong; the message names `where`.
    """
    try:
        axis, dtype = int(found["channel_axis"]), found["dtype"]
        layer = make(**parameters, channel_axis=axis, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: damaged: {error}") from error
    for name, value in parameters.items():
        if not np.array_equal(getattr(layer, name), value):
            raise ValueError(f"{where}: damaged: {name} is not rounded as the format requires")
    for key, value in metadata(layer, kind).items():
        if found[key] != value:
            raise ValueError(f"{where}: damaged: {key} is {found[key]!r}, but that of the layer is {value!r}")
    return layer


def read(path: str | os.PathLike[str], makers: Mapping[Kind, Callable[..., _Layer]]) -> _Layer:
    """Read a file and make its layer; `FrozenBatchNorm.load` documents it.

    Args:
        path: The file.
        makers: The class of the layer by each kind that the file may have.
    """
    where = os.fspath(path)
    Path(where).open("rb").close()  # says better than safetensors why a file cannot be read
    try:
        with safe_open(where, framework="np") as file:
            found = file.metadata() or {}
            kind = kind_of(where, found, makers)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{where}: not a whole safetensors file: {error}") from error

    wanted = dict.fromkeys(kind.matrices, 2) | dict.fromkeys(kind.vectors, 1)
    sizes = {values.shape[:1] for values in tensors.values()}
    dtypes = {values.dtype.name for values in tensors.values()}
    ranks = {name: values.ndim for name, values in tensors.items()}
    if ranks != wanted or dtypes != {found["dtype"]} or len(sizes) != 1:
        shapes = ((kind.matrices, "(channels, D)"), (kind.vectors, "(channels,)"))
        described = "; ".join(
            f"{', '.join(names)} of {found['dtype']} and shape {shape}" for names, shape in shapes if names
        )
        there = ", ".join(f"{name} {values.dtype}{values.shape}" for name, values in sorted(tensors.items()))
        raise ValueError(f"{where}: {described} wanted, found {there or 'no tensors'}")
    numbers = {name: _number(where, name, found[name]) for name in kind.numbers}
    return restore(makers[kind], where, found, tensors | numbers, kind)


def _number(where: str, name: str, text: str) -> float:
    try:
        return float.fromhex(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: damaged: {name} is {text!r}, not a hexadecimal float") from error


def encode(layer: FrozenLayer, kind: Kind) -> bytes:
    """Return the bytes of the file.

    The header is written here and not by the safetensors package: that orders metadata by a random hash, but
    the same layer must always make the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": metadata(layer, kind)}
    data = b""
    for name in kind.tensors:
        values = getattr(layer, name)
        start = len(data)
        data += values.astype(layer.dtype.newbyteorder("<")).tobytes()
        code, offsets = _CODES[layer.dtype.name], [start, len(data)]
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text + data


def write(layer: FrozenLayer, path: str | os.PathLike[str], kind: Kind) -> None:
    """Write a file, whole or not at all; `FrozenBatchNorm.save` documents it."""
    with replacing(Path(path)) as file:
        file.write(encode(layer, kind))
