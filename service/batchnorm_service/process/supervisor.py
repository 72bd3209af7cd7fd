"""The supervisor, which starts, replaces and ends several processes that share one socket.

uvicorn's own supervisor does not wait for a drain, and does not end its workers when it is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from typing import Final

from uvicorn.config import STARTUP_FAILURE

from batchnorm_service.models.shared_state import SharedState
from batchnorm_service.process.server import SHUTDOWN_SECONDS
from batchnorm_service.settings import Settings

logger = logging.getLogger(__name__)

# A worker that dies soon after its start is not replaced before this time is over.
RESTART_SECONDS: Final = 1.0


def supervise(settings: Settings, state: SharedState, listener: socket.socket) -> int:
    """Run `settings.workers` processes until SIGTERM or SIGINT, and return the status to exit with."""
    # Workers hold the reading end, which closes when this process is gone, however it ended.
    reader, writer = os.pipe()
    try:
        return asyncio.run(_Supervisor(settings, state, listener, reader).run())
    finally:
        os.close(reader)
        os.close(writer)


class _Supervisor:
    def __init__(self, settings: Settings, state: SharedState, listener: socket.socket, alive: int) -> None:
        descriptors = (listener.fileno(), alive)
        arguments = (str(state.path), *map(str, descriptors))
        self._settings = settings
        self._listener = listener
        self._command = (sys.executable, "-m", "batchnorm_service.process.worker", *arguments)
        self._descriptors = descriptors
        self._running: set[Process] = set()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._stop, sig)
        slots = [asyncio.create_task(self._keep_one()) for _ in range(self._settings.workers)]
        await self._stopping.wait()
        self._listener.close()  # else clients could still connect after the last worker has closed its own
        patience = self._settings.drain_seconds + SHUTDOWN_SECONDS + 5
        await asyncio.wait(slots, timeout=patience)
        for process in self._running:
            logger.error("worker %d did not end in time and is killed", process.pid)
            _send(process, signal.SIGKILL)
        await asyncio.gather(*slots)
        return self._status

    def _stop(self, sig: signal.Signals) -> None:
        self._stopping.set()
        for process in self._running:
            _send(process, sig)

    async def _keep_one(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            # In a group of its own: what a terminal sends to the group is forwarded from here, once.
            process = await asyncio.create_subprocess_exec(
                *self._command, pass_fds=self._descriptors, process_group=0
            )
            self._running.add(process)
            if self._stopping.is_set():
                _send(process, signal.SIGTERM)
            status = await process.wait()
            self._running.discard(process)
            if self._stopping.is_set():
                return
            if status == STARTUP_FAILURE:
                logger.error("worker %d could not start", process.pid)
                self._status = status
                self._stop(signal.SIGTERM)
                return
            logger.error("worker %d ended with status %d and is replaced", process.pid, status)
            await asyncio.sleep(began + RESTART_SECONDS - loop.time())


def _send(process: Process, sig: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended, and the task that waits for it has not run yet
        process.send_signal(sig)
