"""Metadata of the service and of its models, and model configurations."""

from __future__ import annotations

from typing import Any, Final

from batchnorm_service import __version__
from batchnorm_service.models.model import Model
from batchnorm_service.protocol.request import INPUT, OUTPUT
from batchnorm_service.protocol.tensors import DATATYPES

PLATFORM: Final = "batchnorm_safetensors"
EXTENSIONS: Final = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]


def server() -> dict[str, Any]:
    """Return the metadata of the service."""
    return {"name": "batchnorm-service", "version": __version__, "extensions": EXTENSIONS}


def of_model(model: Model, versions: list[str]) -> dict[str, Any]:
    """Return the metadata of a model; `parameters` has what a fixed datatype and shape cannot express."""
    datatypes = [DATATYPES[dtype] for dtype in model.dtypes]
    tensor = {"datatype": datatypes[0], "shape": model.shape}
    return {
        "name": model.name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, **tensor}],
        "outputs": [{"name": OUTPUT, **tensor}],
        "parameters": {
            "fingerprint": model.layer.fingerprint,
            "datatypes": ",".join(datatypes),
            "channel_axis": model.layer.channel_axis,
            **model.parameters,
        },
    }


def configuration(model: Model) -> dict[str, Any]:
    """Return the part of the model configuration that tools ask for; batching is left to the client."""
    datatype = DATATYPES[model.dtypes[0]]
    tensor = {"data_type": f"TYPE_{datatype}", "dims": model.shape}
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "batchnorm",
        "version_policy": {"specific": {"versions": [int(model.version)]}},
        "max_batch_size": 0,
        "input": [{"name": INPUT, **tensor}],
        "output": [{"name": OUTPUT, **tensor}],
    }
