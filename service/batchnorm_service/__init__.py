"""HTTP service for frozen batch normalization and whitening layers (Open Inference Protocol v2).

Each module imports only modules above it in this list and, without cycles, beside it; a test checks this.

    errors, logs, keys    errors without HTTP; log records; the keys of clients
    models/               models on disk, shared between processes, and served
    protocol/             one inference request of the protocol <-> one call of a model
    counts/               counters of requests, summed over processes
    settings              the settings of a process
    lifecycle             the background work of a process: following changes of models and keys
    context               the objects that the endpoints share
    http/                 the web application; the only folder that imports the web framework
    process/              uvicorn with a graceful shutdown, for one process or several

`__main__` starts a process. `batchnorm_service.http.app.create_app` is the entry point for an ASGI server; it
is not imported here, so that the modules below `http` load without a web framework.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("batchnorm-service")
