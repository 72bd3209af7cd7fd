"""How far the outputs of a changed ONNX model are from those of the original, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from batchnorm.onnx.calibration import Calibration
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.runtime import open_session, run

Feeds: TypeAlias = Mapping[str, NDArray[Any]]
"""The inputs of a model by name."""

_BATCH = 4  # of generated inputs whose first axis is dynamic
_SIZE = 32  # of their other dynamic axes


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far an output of a changed model is from that of the original one.

    Attributes:
        output: Name of the output.
        absolute: The largest difference; inf where only one of the two is finite.
        relative: `absolute` over the largest finite magnitude of the original output.
        ulps: `absolute` in units in the last place of that magnitude.
    """

    output: str
    absolute: float
    relative: float
    ulps: float


def compare(graph: Graph, changed: onnx.ModelProto, feeds: Iterable[Any]) -> tuple[OutputError, ...]:
    """Run two models on the same inputs and return how far their outputs are apart.

    Graph optimizations are off, so that ONNX Runtime does not fold batch norms by itself. Outputs that are no
    tensors of float16, float32 or float64, or are empty, are left out.

    Args:
        graph: The original model.
        changed: The changed copy.
        feeds: Inputs, one mapping of names to arrays for each run.

    Raises:
        ImportError: The package onnxruntime is not installed.
        OSError: A file with data of the model cannot be read.
        ValueError: ONNX Runtime does not take a model or the inputs, or there are none.
        TypeError: The inputs of a run are no mapping.
    """
    sessions = [open_session(graph, model, optimize=False) for model in (graph.model, changed)]
    largest: dict[str, tuple[np.dtype[Any], float, float]] = {}
    for _, feed in Calibration(graph, feeds, argument="inputs"):
        before, after = (run(graph, session, feed, graph.outputs) for session in sessions)
        for name, old, new in zip(graph.outputs, before, after, strict=True):
            if isinstance(old, np.ndarray) and old.dtype.kind == "f" and old.size:
                _, scale, absolute = largest.get(name, (old.dtype, 0.0, 0.0))
                largest[name] = old.dtype, max(scale, _scale(old)), max(absolute, _difference(old, new))
    return tuple(_error(name, *found) for name, found in largest.items())


def generated(graph: Graph) -> dict[str, NDArray[Any]]:
    """Return standard normal inputs for a model, the same each time.

    A dynamic size is 4 on the first axis and 32 on others, the same for all axes of one name.

    Raises:
        ValueError: An input is no tensor of floats of known rank.
    """
    rng = np.random.default_rng(0)
    named: dict[str, int] = {}
    feeds: dict[str, NDArray[Any]] = {}
    for name, entry in graph.inputs.items():
        dtype = graph.elements.get(name)
        if dtype is None or dtype.name not in ("float16", "float32", "float64"):
            found = "of an unknown type" if dtype is None else f"of {dtype}"
            raise ValueError(f"inputs: wanted, since {name!r} of {graph.where} is {found}, and none are made")
        if name not in graph.shapes:
            raise ValueError(f"inputs: wanted, since the rank of {name!r} of {graph.where} is not known")
        shape = []
        for axis, dim in enumerate(entry.type.tensor_type.shape.dim):
            size = _SIZE if axis else _BATCH
            if dim.dim_param:
                size = named.setdefault(dim.dim_param, size)
            fixed = (
                dim.HasField("dim_value") and dim.dim_value >= 0
            )  # some exporters write -1 where it varies
            shape.append(dim.dim_value if fixed else size)
        feeds[name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def _scale(values: NDArray[Any]) -> float:
    return float(np.abs(values).max(where=np.isfinite(values), initial=0))


def _difference(old: NDArray[Any], new: NDArray[Any]) -> float:
    """Return the largest difference, where equal infinities and two NaNs differ by nothing."""
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    with np.errstate(invalid="ignore"):
        difference = np.abs(new.astype(np.float64) - old.astype(np.float64))
    difference = np.where(np.isfinite(old) & np.isfinite(new), difference, np.inf)
    return float(difference.max(where=~same, initial=0))


def _error(name: str, dtype: np.dtype[Any], scale: float, absolute: float) -> OutputError:
    if absolute == 0:
        return OutputError(name, 0.0, 0.0, 0.0)
    relative = absolute / scale if scale else np.inf
    return OutputError(name, absolute, relative, absolute / float(np.spacing(dtype.type(scale))))
