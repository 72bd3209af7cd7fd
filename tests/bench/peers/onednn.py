"""oneDNN 3 through its C interface: primitives made beforehand, executed on given memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from pathlib import Path

import numpy as np

from bench.case import EPS, Call, Case
from bench.rows import BACKWARD, FORWARD, INFERENCE


def load() -> ctypes.CDLL:
    """The library that the package installs beside Python's own, or the system's."""
    beside = sorted((Path(sys.prefix) / "lib").glob("libdnnl.so.3*"))
    name = str(beside[0]) if beside else ctypes.util.find_library("dnnl")
    try:
        library = ctypes.CDLL(name) if name else None
    except OSError as error:
        raise ImportError(str(error)) from None
    if library is None or numbers(library)[0] != 3:
        raise ImportError("no libdnnl of version 3")
    return library


def numbers(library: ctypes.CDLL) -> list[int]:
    library.dnnl_version.restype = POINTER(c_int)
    return library.dnnl_version()[:3]


os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
LIBRARY = load()

# Values of dnnl_types.h and dnnl_common_types.h.
CPU, IN_ORDER = 1, 1
TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
TRAINING, INFERENCE_KIND, BACKWARD_KIND = 64, 96, 128
GLOBAL_STATISTICS, USE_SCALE, USE_SHIFT = 1, 2, 4
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT = 1, 17, 49, 50, 51, 52
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256


class Argument(ctypes.Structure):
    _fields_ = (("arg", c_int), ("memory", c_void_p))


def version() -> str:
    return ".".join(map(str, numbers(LIBRARY)))


def made(function: str, *arguments: object) -> c_void_p:
    """What `function` writes into its first argument; raises if that returns an error."""
    result = c_void_p()
    status = getattr(LIBRARY, function)(byref(result), *arguments)
    if status:
        raise NotImplementedError(f"{function}: status {status}")
    return result


ENGINE = made("dnnl_engine_create", c_int(CPU), c_size_t(0))
STREAM = made("dnnl_stream_create", ENGINE, c_uint(IN_ORDER))


def description(a: np.ndarray) -> c_void_p:
    dims = (c_int64 * 12)(*a.shape)
    strides = (c_int64 * 12)(*(s // a.itemsize for s in a.strides))
    return made(
        "dnnl_memory_desc_create_with_strides", c_int(a.ndim), dims, c_int(TYPES[a.dtype.name]), strides
    )


def executed(descriptor: c_void_p, tensors: dict[int, np.ndarray]) -> Call:
    primitive = made("dnnl_primitive_create", descriptor)
    arguments = (Argument * len(tensors))()
    for place, (index, a) in zip(arguments, tensors.items(), strict=True):
        memory = made("dnnl_memory_create", description(a), ENGINE, c_void_p(a.ctypes.data))
        place.arg, place.memory = index, memory.value
    execute, wait = LIBRARY.dnnl_primitive_execute, LIBRARY.dnnl_stream_wait
    count = c_int(len(tensors))

    def run():
        if execute(primitive, STREAM, count, arguments) or wait(STREAM):
            raise RuntimeError("oneDNN failed")

    return run


def calls(case: Case, threads: int) -> dict[str, Call]:
    if case.row.dtype not in TYPES:
        return {}
    channels_last = case.row.axis == -1
    x, dy, out = (np.moveaxis(a, -1, 1) if channels_last else a for a in (case.x, case.dy, case.out))
    parameters = {SCALE: case.gamma, SHIFT: case.beta}
    statistics = {MEAN: np.empty_like(case.mean), VARIANCE: np.empty_like(case.var)}
    population = {MEAN: case.mean, VARIANCE: case.var}
    layout, flags, no_attributes = description(x), USE_SCALE | USE_SHIFT, c_void_p()

    def forward(kind: int, flags: int) -> c_void_p:
        create = "dnnl_batch_normalization_forward_primitive_desc_create"
        return made(create, ENGINE, c_int(kind), layout, layout, c_float(EPS), c_uint(flags), no_attributes)

    try:
        hint = forward(TRAINING, flags)
        inference = forward(INFERENCE_KIND, flags | GLOBAL_STATISTICS)
        backward = made(
            "dnnl_batch_normalization_backward_primitive_desc_create",
            ENGINE,
            c_int(BACKWARD_KIND),
            *(layout, layout, layout, c_float(EPS), c_uint(flags)),
            *(hint, no_attributes),
        )
    except NotImplementedError:
        return {}  # this processor has no kernel for the dtype
    sums = {DIFF_SCALE: np.empty_like(case.gamma), DIFF_SHIFT: np.empty_like(case.beta)}
    train = executed(hint, {SRC: x, DST: out} | parameters | statistics)
    train()  # the statistics that the backward pass reads
    run = {
        FORWARD: train,
        INFERENCE: executed(inference, {SRC: x, DST: out} | parameters | population),
        BACKWARD: executed(
            backward, {SRC: x, DIFF_DST: dy, DIFF_SRC: out, SCALE: case.gamma} | statistics | sums
        ),
    }

    def answering(call: Call) -> Call:
        def answer():
            call()
            return case.out

        answer.kept = (statistics, sums)  # bound by address
        return answer

    return {direction: answering(call) for direction, call in run.items()}
