"""HTTP service for frozen batch normalization layers (Open Inference Protocol v2).

Each module knows only those above it in this list and, without circles, those beside it; a test holds it.

    errors, logs, keys    errors without HTTP; log records; the keys of clients
    models/               models on disk, shared between processes, and served
    protocol/             one inference request of the protocol <-> one call of a model
    counts/               what was answered, summed over processes
    settings              what a process is started with
    lifecycle             what a process does beside answering
    context               what the endpoints share
    http/                 the web application; only here is the web framework known
    process/              uvicorn with an orderly end, for one process or several

`__main__` starts a process. `batchnorm_service.http.app.create_app` is the entry point for an ASGI server; it
is not imported here, so that the lower rooms load without a web framework.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("batchnorm-service")
