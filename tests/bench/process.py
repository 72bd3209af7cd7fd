"""An object in a process of its own, as users run it, and the memory that this process takes.

Contenders in one process would share the memory that its allocator keeps, and it would be chance which of
them has to fault pages in.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


class Process:
    """What `make(*args)` returns, in a process of its own, which ends with `close`.

    Errors from there are RuntimeErrors that begin with `label`.
    """

    def __init__(self, label: str, make: Callable[..., object], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, label, make, args), daemon=True)
        self.process.start()
        theirs.close()  # or the end of the process would not be seen

    def ask(self, method: str, *args: object) -> Any:
        """What a method of the object there returns or raises."""
        self.connection.send((method, args))
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()


def serve(connection: Connection, label: str, make: Callable[..., object], args: tuple[object, ...]) -> None:
    """Do what the other end asks of the object, until that closes."""
    made = make(*args)
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        try:
            connection.send(getattr(made, method)(*given))
        except Exception as error:
            connection.send(RuntimeError(f"{label}: {error!r}"))


def peak_mib() -> float:
    """MiB at the peak of this process, by VmHWM: ru_maxrss also counts the process that started this one."""
    kib = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert kib is not None
    return int(kib[1]) / 1024


def forget_peak() -> None:
    """Set the peak to the memory that this process has now."""
    STATUS.with_name("clear_refs").write_text("5")
