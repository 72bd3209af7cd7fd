"""HTTP service for frozen batch normalization layers (Open Inference Protocol v2).

Layers, each of which knows only those above it in this list:

    errors.py      the refusals, as exceptions without HTTP
    models.py      frozen layers found on disk; calls `batchnorm.FrozenBatchNorm`, no HTTP, no JSON
    tensors.py     datatypes and numbers of the protocol <-> NumPy arrays
    protocol.py    one inference message <-> one call of a model
    statistics.py  what was answered, counted
    service.py     the object that the endpoints share
    refusals.py    the one table from refusal to HTTP status
    infer.py       the endpoint that takes and gives tensors, plain ASGI
    app.py         routes, and what every request passes

`settings.py` and `__main__.py` start a process. `batchnorm_service.app.create_app` is the entry point for an
ASGI server; it is not imported here, so that the lower layers load without a web framework.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("batchnorm-service")
