"""Reading of bodies into one block of memory, and the content codings gzip and deflate."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Final

import numpy as np
from starlette.types import Receive

from batchnorm_service.errors import BodyTooLargeError, InvalidInputError
from batchnorm_service.protocol.tensors import Bytes

# zlib's window sizes: the format `deflate` of HTTP is that of zlib, and x-gzip is another name of gzip.
CODINGS: Final = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
# A body may be several gzip files in a row, called members; even an empty one takes time.
MAX_MEMBERS: Final = 2**16
_GZIP_MAGIC: Final = b"\x1f\x8b"
_WINDOW: Final = 1024
# The low bits of tensors are noise: higher levels compress them hardly better.
_LEVEL: Final = 1


# After a block of this size is freed, glibc keeps freed blocks up to it (its largest threshold is 32 MiB).
_KEPT: Final = 31 * 2**20


class DisconnectedError(Exception):
    """The client disconnected before its request was complete."""


def keep_memory() -> None:
    """Make the C library keep freed memory for the next message.

    Otherwise it returns blocks of the size of tensors to the kernel, which clears them for the next request,
    and that takes as long as normalizing them. If the library is not glibc, this does nothing.
    """
    np.empty(_KEPT, np.uint8)


async def read(length: int | None, receive: Receive, limit: int) -> Bytes:
    """Return a body: the received bytes if they came in one piece, else in writable memory.

    Args:
        length: The announced length; None for a chunked body.
        receive: ASGI's receive.
        limit: Largest number of bytes that is accepted.

    Raises:
        BodyTooLargeError: The body exceeds the limit; raised before reading if its length is announced.
        DisconnectedError: The client disconnected.
    """
    if length is not None and length > limit:
        raise _too_large(limit)
    chunk, more = await _chunk(receive)
    if not more and len(chunk) <= limit:
        return chunk
    memory = np.empty(limit if length is None else length, np.uint8).data
    size = 0
    while True:
        if size + len(chunk) > len(memory):
            raise _too_large(limit)
        memory[size : size + len(chunk)] = chunk
        size += len(chunk)
        if not more:
            return memory[:size]
        chunk, more = await _chunk(receive)


async def _chunk(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise DisconnectedError
    return message.get("body", b""), message.get("more_body", False)


def decompress(coding: bytes, body: Bytes, limit: int) -> bytes:
    """Return a compressed body, decompressed.

    Raises:
        InvalidInputError: The body is damaged, cut short, or followed by other bytes.
        BodyTooLargeError: Decompressed, it exceeds `limit` bytes (no more are ever made), or has too many
            members.
    """
    parts: list[bytes] = []
    room = limit
    whole = rest = memoryview(body)
    # zlib copies what follows a member: the first gets all bytes, later ones little more than their own.
    window = len(whole)
    for _ in range(MAX_MEMBERS):
        machine = zlib.decompressobj(CODINGS[coding])
        while not machine.eof:
            if not rest:
                raise InvalidInputError(f"the body is cut short: {coding.decode()} has not ended")
            try:
                part = machine.decompress(rest[:window], room + 1)
            except zlib.error as reason:
                raise InvalidInputError(f"the body is not {coding.decode()}: {reason}") from reason
            parts.append(part)
            room -= len(part)
            if room < 0:
                raise _too_large(limit)
            rest, window = rest[window:], 2 * window
        rest = whole[len(whole) - len(rest) - len(machine.unused_data) :]
        if not rest:
            return b"".join(parts)
        if coding == b"deflate" or bytes(rest[:2]) != _GZIP_MAGIC:
            raise InvalidInputError(f"{len(rest)} bytes follow the end of {coding.decode()}")
        window = _WINDOW
    raise BodyTooLargeError(f"the body has more than {MAX_MEMBERS} members of {coding.decode()}")


def compress(coding: bytes, parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Return the concatenated parts, compressed by a coding of `CODINGS`."""
    machine = zlib.compressobj(_LEVEL, wbits=CODINGS[coding])
    return b"".join([*map(machine.compress, parts), machine.flush()])


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body exceeds the limit of {limit} bytes")
