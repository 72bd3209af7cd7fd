"""HTTP service for frozen batch normalization layers (Open Inference Protocol v2).

Rooms, each of which knows only those above it in this list:

    errors, logs, keys    errors without HTTP; log records; keys of clients
    models/               models on disk, in shared memory and served; calls `batchnorm.FrozenBatchNorm`
    protocol/             one inference message of the protocol <-> one call of a model
    counts/               what was answered, summed over processes
    settings, lifecycle, context    what a process is started with, and what its endpoints share
    http/                 the web application; the only room that knows the web framework
    process/              uvicorn, with an orderly end; several processes

`__main__` starts a process. `batchnorm_service.http.app.create_app` is the entry point for an ASGI server; it
is not imported here, so that the lower rooms load without a web framework.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("batchnorm-service")
