"""The protocol layer: one inference message of the Open Inference Protocol v2 <-> one call of a model.

A request is JSON, or JSON followed by the bytes of the tensor, the length of the JSON given beside it (binary
tensor extension), or with a length of 0 the bytes alone (its raw form).
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
# No text has them: a body with one is no JSON alone.
_NOT_TEXT: Final = re.compile(rb"[\x00-\x08\x0e-\x1f]")


@dataclass(frozen=True)
class Rules:
    """What every message must keep to, and what every answer does.

    Attributes:
        max_elements: The most elements that a tensor may have.
        max_depth: How deep JSON may be nested.
        null: Whether NaN and infinities are null in JSON; else they are tokens, as Triton's.
    """

    max_elements: int = 2**62
    max_depth: int = 100
    null: bool = False


class Reply(NamedTuple):
    """An inference response, and what it took.

    Attributes:
        parts: The message.
        json_length: Length of its JSON part where bytes follow, else None.
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
        body: The request; in writable memory the output takes the place of the input.
        json_length: Length of its JSON part as the client gave it; None means that all of it is JSON.
        rules: The limits, and the form of the answer.

    Raises:
        InvalidInputError: The message is malformed or does not fit the model.
        BodyTooLargeError: The tensor has too many elements.
        FingerprintMismatchError: The message demands another model.
        UnsupportedError: It asks for an extension or a datatype that is not there.
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
        # Blanks after JSON are JSON: the tensor starts at a multiple of the largest element.
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
    """Return the head of a message, the arrays in it, and where the bytes of the tensor begin."""
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
    """Return why a body that was read as JSON may be none; empty where nothing shows it."""
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
    """Return writable memory with the bytes of the tensor: those of the body, if they can be written."""
    given = memoryview(body)[start:]
    if len(given) != head.nbytes:
        raise InvalidInputError(
            f"input {INPUT!r}: {head.nbytes} bytes wanted for shape {list(head.shape)}, got {len(given)}"
        )
    return bytearray(given) if given.readonly else given


def _rows(model: Model, shape: tuple[int, ...]) -> int:
    """Size of the batch, which is the first axis unless that is the channels'."""
    return 1 if model.layer.channel_axis in (0, -len(shape)) else shape[0]
