"""The background work of a process: following changes of models and keys, and shutting down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NoReturn

from anyio import to_thread

from batchnorm_service.keys import Keyring
from batchnorm_service.models.repository import Repository

logger = logging.getLogger(__name__)

WATCH_SECONDS: Final = 0.1


@dataclass
class Lifecycle:
    """State of the process between start and end.

    Attributes:
        stopping: Whether the process is shutting down, so that new clients should connect elsewhere.
    """

    stopping: bool = False


@asynccontextmanager
async def watch(repository: Repository, keyring: Keyring | None) -> AsyncIterator[None]:
    """Apply changes of the models and of the keys while the block runs."""
    task = asyncio.create_task(_watch(repository, keyring))
    try:
        yield
    finally:
        task.cancel()


async def _watch(repository: Repository, keyring: Keyring | None) -> NoReturn:
    said = ""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        if keyring is not None:
            keyring.refresh()
        if repository.stale:
            try:
                await to_thread.run_sync(repository.refresh)
            # The old models are still served, and the next round tries again; the error is logged once.
            except Exception as reason:
                if str(reason) != said:
                    logger.error("the new list of models is not taken: %s", reason)
                said = str(reason)
