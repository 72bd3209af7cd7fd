"""The binary half of the route as a plain ASGI endpoint, mounted on FastAPI."""

from __future__ import annotations

import affine
import numpy as np
import orjson
from fastapi import FastAPI

MODELS = affine.load()


async def infer(scope, receive, send) -> None:
    chunks = []
    more = True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    name = scope["path"].split("/")[3]
    scale, shift = MODELS[name]
    cut = int(dict(scope["headers"])[b"inference-header-content-length"])
    tensor = orjson.loads(memoryview(body)[:cut])["inputs"][0]
    y = np.frombuffer(body, np.float32, offset=cut).reshape(tensor["shape"]) * scale
    y += shift
    output = {
        "name": "y",
        "datatype": "FP32",
        "shape": tensor["shape"],
        "parameters": {"binary_data_size": y.nbytes},
    }
    head = orjson.dumps({"model_name": name, "model_version": "1", "outputs": [output]})
    answer = b"".join((head, y))
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"inference-header-content-length", b"%d" % len(head)),
        (b"content-length", b"%d" % len(answer)),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


app = FastAPI()
app.mount("/v2/models", infer)
