"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` once it is whole, and leaves no trace if it never is.

    Whoever reads, after a crash too, finds the old file or the new one. Of a symbolic link the target is
    replaced.

    Raises:
        ValueError: ``path`` is something else than a file: a device, a pipe, a folder.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file, which alone can be replaced")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Not by tempfile, whose files nobody else may read: the umask is to decide that.
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
