"""A FastAPI route as most would write it: pydantic models with lists of numbers."""

from __future__ import annotations

import affine
import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

MODELS = affine.load()

app = FastAPI()


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


@app.post("/v2/models/{name}/infer")
async def infer(name: str, request: InferRequest) -> InferResponse:
    scale, shift = MODELS[name]
    tensor = request.inputs[0]
    y = np.array(tensor.data, np.float32).reshape(tensor.shape) * scale + shift
    output = Tensor(name="y", shape=tensor.shape, datatype="FP32", data=y.ravel().tolist())
    return InferResponse(model_name=name, model_version="1", outputs=[output])
