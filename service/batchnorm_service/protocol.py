"""The protocol layer: one inference message of the Open Inference Protocol v2 <-> one call of a model.

A request is JSON, or JSON followed by the bytes of the tensor, the length of the JSON given beside it (binary
tensor extension), or with a length of 0 the bytes alone (its raw form).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import orjson
from numpy.typing import NDArray

from batchnorm_service.errors import InvalidInputError, UnsupportedError
from batchnorm_service.models import MAX_RANK, Model
from batchnorm_service.tensors import (
    DATATYPES,
    JSON_DATATYPES,
    Bytes,
    numbers_from_json,
    numbers_to_json,
    numpy_dtype,
    parse_json,
    view,
)

INPUT: Final = "x"
OUTPUT: Final = "y"
PLATFORM: Final = "batchnorm_safetensors"
EXTENSIONS: Final = ["binary_tensor_data", "model_configuration", "statistics"]

_KINDS: Final[dict[type, str]] = {
    dict: "an object", list: "an array", str: "a string", int: "an integer", bool: "true or false"
}  # fmt: skip
_LENGTH = re.compile(r"[0-9]{1,18}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """An inference request, checked against the model that it is for.

    Attributes:
        x: The input; it may be a misaligned view of the message.
        datatype: The protocol's name of its dtype, and of the output's.
        id: The client's name of the request, if any.
        binary: Whether the output is wanted as bytes.
    """

    x: NDArray[Any]
    datatype: str
    id: str | None
    binary: bool


@dataclass(frozen=True)
class Reply:
    """An inference response.

    Attributes:
        body: The message.
        json_length: Length of its JSON part where bytes follow, else None.
    """

    body: bytes | memoryview
    json_length: int | None


def metadata(model: Model, versions: list[str]) -> dict[str, Any]:
    """Return the metadata of a model; `parameters` says what a fixed datatype and shape cannot."""
    datatypes = [DATATYPES[dtype] for dtype in model.dtypes]
    tensor = {"datatype": datatypes[0], "shape": model.shape}
    return {
        "name": model.name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, **tensor}],
        "outputs": [{"name": OUTPUT, **tensor}],
        "parameters": {
            "fingerprint": model.layer.fingerprint,
            "datatypes": ",".join(datatypes),
            "channel_axis": model.layer.channel_axis,
            "eps": model.layer.eps,
        },
    }


def configuration(model: Model) -> dict[str, Any]:
    """Return the model configuration, as much of it as tools ask for; batching is the client's affair."""
    datatype = DATATYPES[model.dtypes[0]]
    tensor = {"data_type": f"TYPE_{datatype}", "dims": model.shape}
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "batchnorm",
        "version_policy": {"specific": {"versions": [int(model.version)]}},
        "max_batch_size": 0,
        "input": [{"name": INPUT, **tensor}],
        "output": [{"name": OUTPUT, **tensor}],
    }


def infer(model: Model, message: Bytes, json_length: str | None) -> Reply:
    """Answer one inference request.

    Args:
        model: The model that computes.
        message: The request.
        json_length: Length of its JSON part as the client gave it; None means that all of it is JSON.

    Raises:
        InvalidInputError: the message is malformed or does not fit the model.
        UnsupportedError: it asks for an extension or a datatype that is not there.
    """
    request = parse(message, json_length, model)
    output: dict[str, Any] = {"name": OUTPUT, "datatype": request.datatype, "shape": request.x.shape}
    # An id may hold what UTF-8 cannot (a lone surrogate); the standard library escapes it.
    head: dict[str, Any] = {"id": orjson.Fragment(json.dumps(request.id))} if request.id else {}
    head |= {"model_name": model.name, "model_version": model.version, "outputs": [output]}
    if not request.binary:
        output["data"] = orjson.Fragment(numbers_to_json(model.infer(request.x)))
        return Reply(orjson.dumps(head), None)

    output["parameters"] = {"binary_data_size": request.x.nbytes}
    text = orjson.dumps(head)
    # Blanks after JSON are JSON: the tensor starts at a multiple of the largest element.
    text += b" " * (-len(text) % 8)
    body = bytearray(len(text) + request.x.nbytes)
    body[: len(text)] = text
    model.infer(request.x, out=view(body, len(text), request.x.shape, request.x.dtype))
    return Reply(memoryview(body), len(text))


def parse(message: Bytes, json_length: str | None, model: Model) -> Request:
    """Read an inference request and check it against the model. Arguments and errors are those of `infer`."""
    length = _json_length(json_length, len(message))
    if length == 0 and json_length is not None:
        return _parse_raw(message, model)
    head = parse_json(bytes(memoryview(message)[:length]))
    if type(head) is not dict:
        raise InvalidInputError(f"request: must be an object, got {reprlib.repr(head)}")

    tensor = _only(_field(head, "inputs", list, "request"), INPUT, "input")
    datatype, shape = _datatype(tensor, model), _shape(tensor)
    binary = _binary_output(head)
    if not binary and datatype not in JSON_DATATYPES:
        raise InvalidInputError(f"output {OUTPUT!r}: {datatype} is not written as JSON: ask for binary_data")
    x = _payload(tensor, datatype, shape, message, length)
    return Request(x, datatype, _field(head, "id", str, "request"), binary)


def _parse_raw(message: Bytes, model: Model) -> Request:
    """A message of bytes alone: datatype and shape are those of the metadata, its one free size follows."""
    datatype = DATATYPES[model.dtypes[0]]
    dtype = numpy_dtype(datatype)
    if model.shape.count(-1) != 1:
        raise InvalidInputError(f"request: raw needs a model with one free size, not {list(model.shape)}")
    row = model.layer.channels * dtype.itemsize
    rows, rest = divmod(len(message), row)
    if rest:
        raise InvalidInputError(f"request: raw takes a multiple of {row} bytes, got {len(message)}")
    shape = tuple(rows if size == -1 else size for size in model.shape)
    return Request(view(message, 0, shape, dtype), datatype, None, binary=True)


def _json_length(given: str | None, available: int) -> int:
    if given is None:
        return available
    if not _LENGTH.fullmatch(given) or int(given) > available:
        raise InvalidInputError(
            f"Inference-Header-Content-Length must be a number up to the {available} bytes of the body, "
            f"got {reprlib.repr(given)}"
        )
    return int(given)


def _field(owner: dict[str, Any], key: str, kind: type[_T], where: str) -> _T | None:
    """Return a member of an object, None where it is absent or null; true is not an integer here."""
    value = owner.get(key)
    if value is None:
        return None
    if type(value) is not kind:
        raise InvalidInputError(f"{where}: {key} must be {_KINDS[kind]}, got {reprlib.repr(value)}")
    return value


def _only(tensors: list[Any] | None, name: str, what: str) -> dict[str, Any]:
    """Return the one tensor of a list, which must have this name."""
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


def _datatype(tensor: dict[str, Any], model: Model) -> str:
    datatype = _field(tensor, "datatype", str, f"input {INPUT!r}")
    accepted = [DATATYPES[dtype] for dtype in model.dtypes]
    if datatype is None or datatype not in accepted:
        raise InvalidInputError(
            f"input {INPUT!r}: datatype must be one of {', '.join(accepted)}, got {reprlib.repr(datatype)}"
        )
    return datatype


def _shape(tensor: dict[str, Any]) -> tuple[int, ...]:
    shape = _field(tensor, "shape", list, f"input {INPUT!r}")
    # The bounds keep the product of the sizes, which errors print, a number of bounded length.
    if (
        shape is None
        or len(shape) > MAX_RANK
        or any(type(size) is not int or not 0 <= size < 2**63 for size in shape)
    ):
        raise InvalidInputError(
            f"input {INPUT!r}: shape must be an array of up to {MAX_RANK} sizes, got {reprlib.repr(shape)}"
        )
    return tuple(shape)


def _binary_output(head: dict[str, Any]) -> bool:
    """Whether the output goes as bytes: the flag of the output, else that of the request, else not."""
    wanted = _field(_parameters(head, "request"), "binary_data_output", bool, "request")
    outputs = _field(head, "outputs", list, "request")
    if outputs:
        output, where = _only(outputs, OUTPUT, "output"), f"output {OUTPUT!r}"
        parameters = _parameters(output, where, "classification", "shared_memory_region")
        flag = _field(parameters, "binary_data", bool, where)
        wanted = wanted if flag is None else flag
    return bool(wanted)


def _payload(
    tensor: dict[str, Any], datatype: str, shape: tuple[int, ...], message: Bytes, start: int
) -> NDArray[Any]:
    where = f"input {INPUT!r}"
    size = _field(_parameters(tensor, where, "shared_memory_region"), "binary_data_size", int, where)
    data = _field(tensor, "data", list, where)
    if (size is None) == (data is None):
        raise InvalidInputError(f"{where}: give either data or binary_data_size")
    rest = len(message) - start
    if rest != (size or 0):
        raise InvalidInputError(f"{where}: {rest} bytes follow the JSON, which announces {size or 0}")
    if data is not None:
        if datatype not in JSON_DATATYPES:
            raise InvalidInputError(f"{where}: {datatype} is not read from JSON: send binary data")
        return numbers_from_json(data, shape, datatype)
    dtype = numpy_dtype(datatype)
    wanted = math.prod(shape) * dtype.itemsize
    if size != wanted:
        raise InvalidInputError(f"{where}: {wanted} bytes wanted for shape {list(shape)}, got {size}")
    return view(message, start, shape, dtype)
