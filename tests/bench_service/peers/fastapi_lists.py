"""FastAPI routes with pydantic models and lists of numbers: as most write them, and with a response model."""

from __future__ import annotations

import affine
import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

MODELS = affine.load()

app = FastAPI()
with_response_model = FastAPI()


class Tensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class InferRequest(BaseModel):
    inputs: list[Tensor]


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    outputs: list[Tensor]


def normalize(name: str, tensor: Tensor) -> list[float]:
    scale, shift = MODELS[name]
    y = np.array(tensor.data, np.float32).reshape(tensor.shape) * scale + shift
    return y.ravel().tolist()


@app.post("/v2/models/{name}/infer")
async def infer(name: str, request: InferRequest):
    tensor = request.inputs[0]
    output = {"name": "y", "shape": tensor.shape, "datatype": "FP32", "data": normalize(name, tensor)}
    return {"model_name": name, "model_version": "1", "outputs": [output]}


@with_response_model.post("/v2/models/{name}/infer")
async def infer_with_response_model(name: str, request: InferRequest) -> InferResponse:
    tensor = request.inputs[0]
    output = Tensor(name="y", shape=tensor.shape, datatype="FP32", data=normalize(name, tensor))
    return InferResponse(model_name=name, model_version="1", outputs=[output])
