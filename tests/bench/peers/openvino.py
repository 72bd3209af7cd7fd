"""OpenVINO: its inference operation, on shared memory; it has no training."""

from __future__ import annotations

import numpy as np
import openvino
from openvino import opset13 as ops

from bench.case import EPS, Call, Case
from bench.rows import INFERENCE

PRECISION = {"float32": "f32", "float16": "f16"}


def version() -> str:
    return openvino.__version__.split("-")[0]


def calls(case: Case, threads: int) -> dict[str, Call]:
    if case.row.dtype not in PRECISION:
        return {}
    x, out = case.rows(case.x), case.rows(case.out)
    data = ops.parameter(x.shape, x.dtype, name="x")
    gamma, beta, mean, var = (
        ops.constant(p.astype(x.dtype)) for p in (case.gamma, case.beta, case.mean, case.var)
    )
    graph = openvino.Model(
        [ops.batch_norm_inference(data, gamma, beta, mean, var, EPS)], [data], "batch_norm"
    )
    compiled = openvino.Core().compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISION[case.row.dtype],
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out, shared_memory=True))

    def infer() -> np.ndarray:
        request.infer()
        return out

    return {INFERENCE: infer}
