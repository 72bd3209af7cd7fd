"""One inference by the Open Inference Protocol v2: a request, a call of the model, an answer.

A request is JSON; or JSON followed by the bytes of the tensor, with the length of the JSON given in a header
(binary tensor extension); or, if that length is 0, bytes alone (the extension's raw form).
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final, NamedTuple

import numpy as np

from batchnorm_service.errors import BodyTooLargeError, FingerprintMismatchError, InvalidInputError
from batchnorm_service.models.model import Model
from batchnorm_service.protocol import request
from batchnorm_service.protocol.request import INPUT, Head
from batchnorm_service.protocol.tensors import (
    DATATYPES,
    DTYPES,
    Bytes,
    Data,
    cut_data,
    put_data,
    shaped,
    view,
)

_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
# No text has these bytes: a body with one is not JSON alone.
_NOT_TEXT: Final = re.compile(rb"[\x00-\x08\x0e-\x1f]")


@dataclass(frozen=True)
class Rules:
    """Limits of messages, and the form of answers.

    Attributes:
        max_elements: Largest number of elements of a tensor.
        max_depth: Largest depth of nested JSON.
        null: Whether NaN and infinities are null in JSON; else they are tokens, as in Triton.
    """

    max_elements: int = 2**62
    max_depth: int = 100
    null: bool = False


class Reply(NamedTuple):
    """An inference response, and the time that it took.

    Attributes:
        parts: The parts of the message.
        json_length: Length of its JSON part if bytes follow, else None.
        rows: Size of the batch.
        read: Nanoseconds that parsing took.
        compute: Nanoseconds that the layer took.
        write: Nanoseconds that printing took.
    """

    parts: list[bytes | bytearray | memoryview]
    json_length: int | None
    rows: int
    read: int
    compute: int
    write: int


def infer(model: Model, body: Bytes, json_length: bytes | None, rules: Rules) -> Reply:
    """Answer one inference request.

    Args:
        model: The model that computes.
        body: The request; if its memory is writable, the output overwrites the input.
        json_length: Length of the JSON part as the client gave it; None if all of it is JSON.
        rules: The limits, and the form of the answer.

    Raises:
        InvalidInputError: The message is malformed or does not fit the model.
        BodyTooLargeError: The tensor has too many elements.
        FingerprintMismatchError: The message requires another fingerprint than that of the model.
        UnsupportedError: The message needs an extension or a datatype that is not supported.
    """
    began = perf_counter_ns()
    head, arrays, length = _read(model, body, json_length, rules)
    _check(model, head)
    if head.size is None:
        x = shaped(arrays[head.array], head.shape)
        memory: bytearray | memoryview = x.reshape(-1).view(np.uint8).data
    else:
        memory = _memory(head, body, length)
        x = view(memory, head.shape, head.dtype)
    if x.size > rules.max_elements:
        raise BodyTooLargeError(
            f"input {INPUT!r}: up to {rules.max_elements} elements are taken, not {x.size}"
        )
    read = perf_counter_ns()
    model.infer(x, out=x)
    computed = perf_counter_ns()
    text = f'"model_name":"{model.name}","model_version":"{model.version}",'.encode().join(head.answer)
    if head.binary:
        # Blanks may follow JSON: they align the tensor to the largest element.
        text += b" " * (-len(text) % 8)
        parts: list[bytes | bytearray | memoryview] = [text, memory]
    else:
        parts = [put_data(text, x, b"}]}", rules.null)]
    return Reply(
        parts,
        len(text) if head.binary else None,
        _rows(model, head.shape),
        read - began,
        computed - read,
        perf_counter_ns() - computed,
    )


def _read(model: Model, body: Bytes, json_length: bytes | None, rules: Rules) -> tuple[Head, list[Data], int]:
    """Return the head of a message, the arrays in its JSON, and the offset of the tensor's bytes."""
    length = len(body) if json_length is None else _json_length(json_length, len(body))
    if length == 0 and json_length is not None:
        return request.raw(model, len(body)), [], 0
    arrays: list[Data] = []
    try:
        if length == len(body):
            text, arrays = cut_data(body, rules.max_elements, rules.max_depth)
        else:
            text = bytes(body[:length])
        head = request.parse(text, rules.max_depth)
    except InvalidInputError as reason:
        if json_length is None and (hint := _hint(bytes(body))):
            raise InvalidInputError(f"{reason} ({hint})") from reason
        raise
    if (rest := len(body) - length) != (head.size or 0):
        raise InvalidInputError(
            f"input {INPUT!r}: {rest} bytes follow the JSON, which announces {head.size or 0}"
        )
    return head, arrays, length


def _hint(body: bytes) -> str:
    """Return a hint why a body that was read as JSON is not JSON; empty if there is none."""
    if not body:
        return "the body is empty"
    if b"binary_data_size" in body or _NOT_TEXT.search(body):
        return "a tensor as bytes needs Inference-Header-Content-Length, the length of the JSON before it"
    return ""


def _json_length(given: bytes, available: int) -> int:
    if not _LENGTH.fullmatch(given) or int(given) > available:
        raise InvalidInputError(
            f"Inference-Header-Content-Length must be a number up to the {available} bytes of the body, "
            f"got {reprlib.repr(given.decode('latin-1'))}"
        )
    return int(given)


def _check(model: Model, head: Head) -> None:
    if DTYPES[head.datatype] not in model.dtypes:
        accepted = ", ".join(DATATYPES[dtype] for dtype in model.dtypes)
        raise InvalidInputError(f"input {INPUT!r}: datatype must be one of {accepted}, got {head.datatype!r}")
    if head.fingerprint is not None and head.fingerprint != model.layer.fingerprint:
        raise FingerprintMismatchError(
            f"the request demands fingerprint {reprlib.repr(head.fingerprint)}, that of the model is "
            f"{model.layer.fingerprint}"
        )


def _memory(head: Head, body: Bytes, start: int) -> bytearray | memoryview:
    """Return writable memory with the bytes of the tensor: the body's own, if it is writable."""
    given = memoryview(body)[start:]
    if len(given) != head.nbytes:
        raise InvalidInputError(
            f"input {INPUT!r}: {head.nbytes} bytes wanted for shape {list(head.shape)}, got {len(given)}"
        )
    return bytearray(given) if given.readonly else given


def _rows(model: Model, shape: tuple[int, ...]) -> int:
    """Return the size of the batch, which is that of the first axis unless that is the channel axis."""
    return 1 if model.layer.channel_axis in (0, -len(shape)) else shape[0]
