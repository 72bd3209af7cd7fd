"""`python -m batchnorm_service.process.worker STATE SOCKET ALIVE`: one worker of the supervisor."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

from batchnorm_service import logs
from batchnorm_service.models.shared_state import SharedState
from batchnorm_service.process.server import serve
from batchnorm_service.settings import Settings


def _end_with_supervisor(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end is closed: nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)


def main(state: str, listener: str, alive: str) -> None:
    """Serve on an inherited socket."""
    logs.configure()
    threading.Thread(target=_end_with_supervisor, args=(int(alive),), daemon=True).start()
    serve(Settings(), SharedState(Path(state)), socket.socket(fileno=int(listener)))


if __name__ == "__main__":
    main(*sys.argv[1:])
