"""Which runtime runs which export, and how exactly: the table of docs/onnx.md, which `main` prints.

    python tests/onnx_runtimes.py [docs/onnx.md]
"""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16)
import numpy as np
import onnx

import batchnorm as bn
import oracle
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.runtime import open_session
from batchnorm.onnx.verify import infer

CHANNELS, COUNT, WEIGHT = 5, 42, 0.25
RATIO = 100  # |mean|/√var of the data
OPSETS = range(9, onnx.defs.onnx_opset_version() + 1)
MODES = ("inference", "exact", "affine", "training")
DTYPES = ("float16", "bfloat16", "float32", "float64")
SAME, WITHIN, LESS, NO = "same bits", "within the bound", "less exact", "–"


def layer_of(dtype):
    rng = np.random.default_rng(1)
    var = rng.uniform(0.5, 2, CHANNELS)
    mean = RATIO * np.sqrt(var) * rng.choice([-1, 1], CHANNELS)
    gamma, beta = rng.uniform(0.5, 2, CHANNELS), rng.normal(size=CHANNELS)
    return bn.FrozenBatchNorm(mean, var, gamma, beta, dtype="float64" if dtype == "float64" else "float32")


def data_of(layer, dtype):
    rng = np.random.default_rng(2)
    shape = (6, CHANNELS, COUNT // 6)
    std, mean = (p.astype(np.float64)[:, None] for p in (np.sqrt(layer.var), layer.mean))
    return (rng.normal(size=shape) * std + mean).astype(dtype)


@functools.cache
def core():
    import openvino

    return openvino.Core()


def openvino(model, x):
    """All outputs; float32 is what OpenVINO computes in on every machine when it is asked to."""
    import openvino

    read = core().read_model(model.SerializeToString())
    compiled = core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    element = {"bfloat16": openvino.Type.bf16}.get(x.dtype.name)
    bits = x.view(np.uint16) if element else x
    tensor = openvino.Tensor(bits, x.shape, element) if element else openvino.Tensor(bits)
    results = list(compiled({"x": tensor}).values())
    y = results[0]
    return [y.view(x.dtype) if element else y, *results[1:]]


def onnx_runtime(model, x):
    graph = Graph(model)
    session = open_session(graph)
    if len(graph.outputs) == 1:
        return [infer(graph, session, x)]
    if x.dtype.name != "bfloat16":
        return session.run(None, {"x": x})
    import onnxruntime

    bits = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), onnx.TensorProto.BFLOAT16)
    y, *state = session.run_with_ort_values(graph.outputs, {"x": bits})
    assert y.element_type() == onnx.TensorProto.BFLOAT16
    return [None, *(value.numpy() for value in state)]  # NumPy cannot hold y


RUNTIMES = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}


def bound(exact, layer, dtype):
    """The documented bound on the error of y in modes that compute in the dtype of the layer."""
    half = 2.0**-53 if layer.dtype == np.float64 else 2.0**-24
    size = (abs(exact.x) + abs(exact.mu)) * abs(exact.gamma) / np.sqrt(exact.sigma2 + exact.eps)
    return 8 * half * (size + abs(exact.beta)) + oracle.ulp(oracle.size(exact), np.dtype(dtype))


def outcome(runtime, mode, dtype, opset):
    """One of the four words above."""
    layer = layer_of(dtype)
    x = data_of(layer, dtype)
    training = {"update_weight": WEIGHT, "count": COUNT} if mode == "training" else {}
    try:
        model = layer.to_onnx(mode=mode, dtype=dtype, opset=opset, rank=3, **training)
    except ValueError as error:
        assert str(error).startswith("opset: "), error
        return NO
    onnx.checker.check_model(model, full_check=True)
    try:
        y, *state = RUNTIMES[runtime](model, x)
    except Exception:  # each runtime has its own
        return NO
    if mode == "training":
        return trained(layer, x, y, state)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    if y.tobytes() == layer(x).tobytes():
        return SAME
    exact = oracle.forward(x, layer.gamma, layer.beta, layer.eps, population=(layer.mean, layer.var))
    within = (abs(oracle.long(y) - exact.y) <= bound(exact, layer, dtype)).all()
    return WITHIN if within else LESS


def trained(layer, x, y, state):
    """In mode "training": y by the statistics of the batch, and both running statistics."""
    moments = bn.moments(x)
    mean = (1 - WEIGHT) * layer.mean + WEIGHT * moments.mean
    var = ((1 - WEIGHT) * layer.var.astype(float) + WEIGHT * moments.var_unbiased) * (COUNT - 1) / COUNT
    half = 2.0**-53 if layer.dtype == np.float64 else 2.0**-24
    # The variance is of differences from the mean: relative to it, an error of the mean is RATIO² times as large.
    limits = 8 * half * abs(mean), 8 * half * RATIO**2 * var
    ok = all(
        (abs(got - wanted) <= limit).all() for got, wanted, limit in zip(state, (mean, var), limits, strict=True)
    )
    if y is not None:
        exact = oracle.forward(x, layer.gamma, layer.beta, layer.eps)
        ok &= bool((abs(oracle.long(y) - exact.y) <= RATIO * bound(exact, layer, x.dtype)).all())
    return WITHIN if ok else LESS


def ranges(outcomes):
    """Outcome by opset as text: each outcome with its opsets, those that nobody runs left out."""
    parts = []
    for word in (SAME, WITHIN, LESS):
        opsets = [opset for opset, found in outcomes.items() if found == word]
        if opsets:
            assert opsets == list(range(opsets[0], opsets[-1] + 1)), opsets
            parts.append(f"{word}, {opsets[0]}–{opsets[-1]}")
    return "; ".join(parts) or NO


def measured(modes=MODES, dtypes=DTYPES, opsets=OPSETS):
    """What each runtime gives, by (mode, dtype) and runtime and opset."""
    found = {}
    for mode in modes:
        for dtype in dtypes:
            of = found[mode, dtype] = {}
            for runtime in RUNTIMES:
                of[runtime] = {opset: outcome(runtime, mode, dtype, opset) for opset in opsets}
            print(".", end="", file=sys.stderr, flush=True)
    return found


def versions():
    import onnxruntime
    import openvino

    return f"onnx {onnx.__version__}, ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__[:8]}"


def table():
    lines = [f"| mode | x | {' | '.join(RUNTIMES)} |", "|---|---|" + "---|" * len(RUNTIMES)]
    for (mode, dtype), of in measured().items():
        lines.append(f"| `{mode}` | {dtype} | {' | '.join(ranges(of[runtime]) for runtime in RUNTIMES)} |")
    return "\n".join(lines)


MARK, END = "<!-- printed by `tests/onnx_runtimes.py` -->\n", "<!-- end -->\n"


def main():
    """Prints the table, and puts it into the page that is named, after its mark."""
    printed = table()
    print(f"\n{printed}")
    for page in map(Path, sys.argv[1:]):
        before, rest = page.read_text().split(MARK)
        page.write_text(f"{before}{MARK}\n{printed}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
