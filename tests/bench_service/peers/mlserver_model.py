"""The layer as a runtime of MLServer, which runs this in its own environment."""

from __future__ import annotations

import affine
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Affine(MLModel):
    async def load(self) -> bool:
        self._scale, self._shift = affine.load()[self.name]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        y = NumpyCodec.decode_input(payload.inputs[0]) * self._scale
        y += self._shift
        return InferenceResponse(
            model_name=self.name, model_version="1", outputs=[NumpyCodec.encode_output("y", y)]
        )
