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

CHANNELS, COUNT, WEIGHT = 5, 4200, 0.25
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
    """All outputs, in memory of ours, since NumPy gets no bfloat16 from ONNX Runtime."""
    session = open_session(Graph(model))
    binding = session.io_binding()
    element = model.graph.input[0].type.tensor_type.elem_type
    binding.bind_input("x", "cpu", 0, element, x.shape, x.ctypes.data)
    outputs = []
    for entry in model.graph.output:
        kind = entry.type.tensor_type.elem_type
        shape = x.shape if entry.name == "y" else (CHANNELS,)
        outputs.append(np.empty(shape, onnx.helper.tensor_dtype_to_np_dtype(kind)))
        binding.bind_output(entry.name, "cpu", 0, kind, shape, outputs[-1].ctypes.data)
    session.run_with_iobinding(binding)
    return outputs


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
    if opset < max(14 if training else 9, 13 if dtype == "bfloat16" else 9):
        return NO  # there is no such model
    model = layer.to_onnx(mode=mode, dtype=dtype, opset=opset, rank=3, **training)
    onnx.checker.check_model(model, full_check=True)
    try:
        y, *state = RUNTIMES[runtime](model, x)
    except Exception:  # each runtime has its own
        return NO
    if mode == "training":
        return trained(layer, x, y, state)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    if mode == "exact" and y.tobytes() == layer(x).tobytes():  # elsewhere it would be chance
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
    # The variance is of differences from the mean, so that rounding weighs RATIO² times as much in it.
    limits = 8 * half * abs(mean), 8 * half * RATIO**2 * var
    ok = all(
        (abs(got - wanted) <= limit).all()
        for got, wanted, limit in zip(state, (mean, var), limits, strict=True)
    )
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

    found = {"onnx": onnx, "ONNX Runtime": onnxruntime, "OpenVINO": openvino}
    return ", ".join(f"{name} {package.__version__.split('-')[0]}" for name, package in found.items())


def table():
    lines = [f"| mode | x | {' | '.join(RUNTIMES)} |", "|---|---|" + "---|" * len(RUNTIMES)]
    for (mode, dtype), of in measured().items():
        lines.append(f"| `{mode}` | {dtype} | {' | '.join(ranges(of[runtime]) for runtime in RUNTIMES)} |")
    return "\n".join(lines)


MARK, END = "<!-- printed by `make onnx-runtimes` -->\n", "<!-- end -->\n"


def main():
    """Prints the table, and puts it into the page that is named, after its mark."""
    printed = f"{versions()}:\n\n{table()}"
    print(f"\n{printed}")
    for page in map(Path, sys.argv[1:]):
        before, rest = page.read_text().split(MARK)
        page.write_text(f"{before}{MARK}\n{printed}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
