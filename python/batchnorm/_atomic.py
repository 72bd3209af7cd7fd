"""Atomic writing of files: a file is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends, and is deleted if the block raises.

    A reader finds either the old file or the new one, even after a crash. If `path` is a symbolic link, its
    target is replaced.

    Raises:
        ValueError: `path` exists and is not a file, but a device, a pipe or a folder.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file, so it cannot be replaced")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Not by tempfile, whose files only their owner may read: the umask is to decide that.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
