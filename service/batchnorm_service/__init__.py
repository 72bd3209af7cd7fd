"""HTTP service for frozen batch normalization layers (Open Inference Protocol v2).

Layers, each of which knows only those above it in this list:

    errors.py      the refusals, as exceptions without HTTP
    models.py      one version of one model; calls `batchnorm.FrozenBatchNorm`, no HTTP, no JSON
    sources.py     a directory of models, and one file of it as a layer
    state.py       what the processes of a service share: the list of models, and who has taken it
    repository.py  the models that are answered by; load and unload
    tensors.py     datatypes and numbers of the protocol <-> NumPy arrays
    message.py     the JSON of an inference request
    protocol.py    one inference message <-> one call of a model
    metadata.py    what the service says of itself and its models
    statistics.py  what was answered, counted; counters.py sums it over processes, metrics.py prints it
    keys.py        who may ask for what
    service.py     the object that the endpoints share
    refusals.py    the one table from refusal to HTTP status
    body.py        bodies in one piece of memory, and their codings
    infer.py       the endpoint that takes and gives tensors, plain ASGI
    control.py     the endpoints of the repository and of metrics
    openapi.py     the document of all paths, with examples
    gate.py        what every request passes first: keys, limits, counters
    app.py         the routes
    logs.py        what is told of requests, a JSON object a line
    lifecycle.py   what a process does beside answering
    server.py      uvicorn, with an orderly end; supervisor.py and worker.py for several processes

`settings.py` and `__main__.py` start a process. `batchnorm_service.app.create_app` is the entry point for an
ASGI server; it is not imported here, so that the lower layers load without a web framework.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("batchnorm-service")
