"""The client of kserve against a service; test_service_peers.py runs this in the environment of kserve.

For every case it prints one line of JSON with what was sent and what came back.
"""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

# For each datatype, whether it is sent as bytes, and whether it comes back as bytes.
CASES = [
    ("FP32", False, False),
    ("FP32", False, True),
    ("FP32", True, False),
    ("FP32", True, True),
    ("FP64", False, False),
    ("FP64", True, True),
    ("FP16", True, True),
]
DTYPES = {"FP32": np.float32, "FP64": np.float64, "FP16": np.float16}


async def main(url: str, model: str, channels: int) -> None:
    client = InferenceRESTClient(config=RESTConfig(protocol="v2", timeout=20))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, model)
    for seed, (datatype, binary_in, binary_out) in enumerate(CASES):
        x = np.random.default_rng(seed).normal(size=(3, channels, 2)).astype(DTYPES[datatype])
        given = InferInput("x", [*x.shape], datatype)
        given.set_data_from_numpy(x, binary_data=binary_in)
        outputs = [RequestedOutput("y", {"binary_data": True})] if binary_out else None
        request = InferRequest(model, [given], request_outputs=outputs)
        response = await client.infer(url, request, model_name=model)
        y = response.outputs[0].as_numpy()
        sent = {"datatype": datatype, "shape": x.shape, "x": x.tobytes().hex(), "y": y.tobytes().hex()}
        print(json.dumps(sent | {"dtype": str(y.dtype), "bytes_back": binary_out}), flush=True)
    await client.close()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
