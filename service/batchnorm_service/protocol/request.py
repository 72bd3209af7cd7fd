"""The JSON of an inference request: the description of the tensor, and the kind of answer."""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final, TypeVar

import numpy as np

from batchnorm_service.errors import InvalidInputError, UnsupportedError
from batchnorm_service.models.model import MAX_RANK, Model
from batchnorm_service.protocol.tensors import DATATYPES, DTYPES, JSON_DATATYPES, numpy_dtype, parse_json

INPUT: Final = "x"
OUTPUT: Final = "y"

_KINDS: Final[dict[type, str]] = {
    dict: "an object", list: "an array", str: "a string", int: "an integer", bool: "true or false"
}  # fmt: skip
# Clients send the same text again and again, and parsing it takes longer than normalizing a small tensor.
_REMEMBERED: Final = 256
_REMEMBERED_BYTES: Final = 1024
_T = TypeVar("_T")


@dataclass(frozen=True)
class Head:
    """An inference request without the tensor.

    Attributes:
        shape: Shape of the input.
        datatype: The protocol's name of its dtype, and of the output's.
        size: Number of bytes of the input that follow the JSON; None if the input is in the JSON.
        binary: Whether the output is wanted as bytes.
        id: The client's name of the request, if any.
        fingerprint: The fingerprint that the model must have, if any.
        array: Index of the input among the arrays that were cut out of the JSON, if it is in the JSON.
    """

    shape: tuple[int, ...]
    datatype: str
    size: int | None
    binary: bool
    id: str | None = None
    fingerprint: str | None = None
    array: int = 0

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of `datatype`."""
        return numpy_dtype(self.datatype)

    @cached_property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes that the elements take."""
        return self.count * self.dtype.itemsize

    @cached_property
    def answer(self) -> tuple[bytes, bytes]:
        """JSON of the answer before and after the name of the model, up to the numbers if it has them."""
        opening = f'{{"id":{json.dumps(self.id)},' if self.id else "{"
        output: dict[str, Any] = {"name": OUTPUT, "datatype": self.datatype, "shape": self.shape}
        if self.binary:
            output["parameters"] = {"binary_data_size": self.nbytes}
        closing = json.dumps({"outputs": [output]}, separators=(",", ":"))[1:].encode()
        return opening.encode(), closing if self.binary else closing.removesuffix(b"}]}") + b',"data":'


def raw(model: Model, size: int) -> Head:
    """Return the head that is equivalent to a request of bytes alone.

    Datatype and shape are those of the metadata; the one free size follows from the number of bytes.

    Raises:
        InvalidInputError: The metadata have more than one free size, or the bytes do not fill the shape.
    """
    head = Head(model.shape, DATATYPES[model.dtypes[0]], size, binary=True)
    if model.shape.count(-1) != 1:
        raise InvalidInputError(f"request: raw needs a model with one free size, not {list(model.shape)}")
    row = model.layer.channels * head.dtype.itemsize
    if size % row:
        raise InvalidInputError(f"request: raw takes a multiple of {row} bytes, got {size}")
    return replace(head, shape=tuple(size // row if length == -1 else length for length in model.shape))


def parse(text: bytes, max_depth: int) -> Head:
    """Read and check the JSON of a request, in which each `data` array of an input is `[i]`.

    Args:
        text: The JSON, or that of `tensors.cut_data`.
        max_depth: Largest depth of nested JSON.

    Raises:
        InvalidInputError: The JSON is malformed, or has inputs or outputs that no model has.
        UnsupportedError: The request needs an extension or a datatype that is not supported.
    """
    return _remembered(text, max_depth) if len(text) <= _REMEMBERED_BYTES else _parse(text, max_depth)


def _parse(text: bytes, max_depth: int) -> Head:
    message = parse_json(text, max_depth)
    if type(message) is not dict:
        raise InvalidInputError(f"request: must be an object, got {reprlib.repr(message)}")
    where = f"input {INPUT!r}"
    tensor = _only(_field(message, "inputs", list, "request"), INPUT, "input")
    datatype = _field(tensor, "datatype", str, where)
    if datatype not in DTYPES:
        raise InvalidInputError(
            f"{where}: datatype must be one of {', '.join(DTYPES)}, got {reprlib.repr(datatype)}"
        )
    size = _field(_parameters(tensor, where, "shared_memory_region"), "binary_data_size", int, where)
    data = _field(tensor, "data", list, where)
    if (size is None) == (data is None):
        raise InvalidInputError(f"{where}: give either data or binary_data_size")
    parameters = _parameters(message, "request")
    binary = _binary_output(message, parameters)
    if data is not None and datatype not in JSON_DATATYPES:
        raise InvalidInputError(f"{where}: {datatype} is not read from JSON: send binary data")
    if not binary and datatype not in JSON_DATATYPES:
        raise InvalidInputError(f"output {OUTPUT!r}: {datatype} is not written as JSON: ask for binary_data")
    return Head(
        _shape(tensor, where),
        datatype,
        size,
        binary,
        _field(message, "id", str, "request"),
        _field(parameters, "fingerprint", str, "request"),
        next(iter(data or ()), 0),
    )


_remembered = lru_cache(_REMEMBERED)(_parse)


def _field(owner: dict[str, Any], key: str, kind: type[_T], where: str) -> _T | None:
    """Return a member of an object, or None if it is absent or null; true does not count as an integer."""
    value = owner.get(key)
    if value is None:
        return None
    if type(value) is not kind:
        raise InvalidInputError(f"{where}: {key} must be {_KINDS[kind]}, got {reprlib.repr(value)}")
    return value


def _only(tensors: list[Any] | None, name: str, what: str) -> dict[str, Any]:
    """Return the only tensor of a list, which must have this name."""
    if tensors is None or len(tensors) != 1 or type(tensors[0]) is not dict:
        raise InvalidInputError(f"request: {what}s must be an array of one object, for {what} {name!r}")
    tensor: dict[str, Any] = tensors[0]
    if tensor.get("name") != name:
        got = reprlib.repr(tensor.get("name"))
        raise InvalidInputError(f"request: the {what} of the model is {name!r}, got {got}")
    return tensor


def _parameters(owner: dict[str, Any], where: str, *unsupported: str) -> dict[str, Any]:
    parameters = _field(owner, "parameters", dict, where) or {}
    for key in unsupported:
        if key in parameters:
            raise UnsupportedError(f"{where}: {key} is not supported")
    return parameters


def _shape(tensor: dict[str, Any], where: str) -> tuple[int, ...]:
    shape = _field(tensor, "shape", list, where)
    # These bounds limit the length of the product of the sizes, which errors print.
    if (
        shape is None
        or len(shape) > MAX_RANK
        or any(type(size) is not int or not 0 <= size < 2**63 for size in shape)
    ):
        raise InvalidInputError(
            f"{where}: shape must be an array of up to {MAX_RANK} sizes, got {reprlib.repr(shape)}"
        )
    return tuple(shape)


def _binary_output(message: dict[str, Any], parameters: dict[str, Any]) -> bool:
    """Return whether the output is bytes: by the output's flag, else by the request's flag, else false."""
    wanted = _field(parameters, "binary_data_output", bool, "request")
    outputs = _field(message, "outputs", list, "request")
    if outputs:
        output, where = _only(outputs, OUTPUT, "output"), f"output {OUTPUT!r}"
        of_output = _parameters(output, where, "classification", "shared_memory_region")
        flag = _field(of_output, "binary_data", bool, where)
        wanted = wanted if flag is None else flag
    return bool(wanted)
