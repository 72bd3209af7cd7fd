"""Statistics of values within a model, measured while ONNX Runtime computes it.

The values are *tapped*: made outputs of a copy of the model, from which all is left out that they do not
depend on. The copy is run as it is, without optimizations of the graph and with a fixed number of threads. So
a value has the same bits whichever others are tapped with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from batchnorm._checks import channels_where, of_channels
from batchnorm._core import Moments, moments
from batchnorm.onnx.calibration import AGAIN, Calibration
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.nodes import values_used
from batchnorm.onnx.runtime import open_session, run
from batchnorm.population import Algorithm2

Advance: TypeAlias = Callable[[float], None]
"""Is called with the fraction of the work that is done."""

_BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of a value: three float64 arrays of shape (channels,), the variance unbiased."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]


class Collected:
    """What was measured of one value: its moments over all batches, and Algorithm 2.

    Args:
        layer: Name of a layer that reads the value, for errors.
        channels: Number of channels that the layer has.

    Attributes:
        layer: That name.
        single: The first batch that has one value in a channel, 0 if none has.
    """

    def __init__(self, layer: str, channels: int) -> None:
        self.layer, self._channels = layer, channels
        self.single = 0
        self._problem = ""
        self._pooled: Moments | None = None
        self._within = Algorithm2()

    def add(self, number: int, x: NDArray[Any]) -> None:
        """Take in the value for a batch, whose number is for errors.

        Raises:
            ValueError: It has not the rank or the channels that the layer wants.
        """
        if x.ndim < 2 or x.shape[1] != self._channels:
            wanted = f"{of_channels(self._channels)} on axis 1"
            raise ValueError(
                f"batches: batch {number}: shape before {self.layer!r} was {x.shape}, wanted {wanted}"
            )
        measured = moments(x, channel_axis=1)
        alone = measured.count.min() < 2
        if alone and not self.single:
            self.single = number
        if self._problem:
            return
        if bad := channels_where(~(np.isfinite(measured.mean) & np.isfinite(measured.m2))):
            # Raised when the statistics are asked for: with `layerwise` those of another run may be finite.
            self._problem = f"batches: batch {number}: values before {self.layer!r} are not finite in {bad}"
            return
        self._pooled = measured if self._pooled is None else self._pooled.merge(measured)
        if not alone:
            self._within.update(measured)

    def statistics(self, population: str) -> Statistics:
        """Return the number of values, the mean and the unbiased variance of each channel.

        Args:
            population: "algorithm2" or "pooled"; see `batchnorm.onnx.recalibrate`.

        Raises:
            ValueError: A value is not finite, or there are too few.
        """
        if self._problem or self._pooled is None:
            raise ValueError(self._problem or f"batches: there are no values before {self.layer!r}")
        pooled = self._pooled
        if population == "algorithm2":
            if self.single:
                found = f"batch {self.single} has one value in a channel before {self.layer!r}"
                raise ValueError(
                    f"batches: {found}, but population='algorithm2' wants 2 or more; see 'pooled'"
                )
            return Statistics(pooled.count, self._within.mean, self._within.var)
        if few := channels_where(pooled.count < 2):
            raise ValueError(f"batches: one value in all before {self.layer!r} in {few}, wanted 2 or more")
        return Statistics(pooled.count, pooled.mean, pooled.var_unbiased)


class Tap(NamedTuple):
    """A value of a model that layers read.

    Attributes:
        value: The name of the value.
        layer: The name of the first layer that reads it, for errors.
        channels: The number of channels of that layer.
        element: The type of the value, None if it is not known.
    """

    value: str
    layer: str
    channels: int
    element: np.dtype[Any] | None


class Meter:
    """Measures values of a model over calibration data.

    Args:
        data: The data.
        memory: Most bytes of the values of one batch that are held together, by the sizes in the first batch;
            a value that is larger is held alone. None is no limit.
        threads: Number of threads of an operator.

    Attributes:
        passes: How often the data have been gone over.
        batches: The number of batches.
        peak: The most bytes of values of one batch that were held together.
    """

    def __init__(self, data: Calibration, memory: int | None, threads: int) -> None:
        self._data, self._memory, self._threads = data, memory, threads
        self.passes = self.batches = self.peak = 0

    def measure(self, graph: Graph, taps: list[Tap], advance: Advance) -> dict[str, Collected]:
        """Go over the data once for each chunk of taps, and return what was measured of each value.

        Args:
            graph: The model.
            taps: The values to measure, in the order in which the model computes them.
            advance: Is called after each batch with the fraction that is done.

        Raises:
            ImportError: The package onnxruntime is not installed.
            OSError: A file cannot be read.
            ValueError: The memory asks for more than one chunk, and the data can be gone over only once; or
                ONNX Runtime cannot run the model; or a batch is not as the model wants it.
            TypeError: A batch has another dtype than the model wants.
        """
        values: dict[str, Tap] = {}
        for tap in taps:  # once each, with the first layer that reads it
            values.setdefault(tap.value, tap)
        collected = {value: Collected(tap.layer, tap.channels) for value, tap in values.items()}
        chunks = self._chunks(graph, [*values.values()])
        if len(chunks) > 1 and not self._data.again:
            reason = f"memory: was {self._memory} bytes, too few for all layers at once"
            raise ValueError(f"{reason}, but batches can be gone over only once; {AGAIN}")
        for position, chunk in enumerate(chunks):
            model = tapped(graph, chunk)
            session = open_session(graph, model, optimize=False, threads=self._threads)
            number = 0
            for number, (done, feeds) in enumerate(self._data, 1):
                arrays = run(graph, session, feeds, [output.name for output in model.graph.output])
                self.peak = max(self.peak, sum(array.nbytes for array in arrays))
                for tap, array in zip(chunk, arrays, strict=True):
                    collected[tap.value].add(number, array)
                if done is not None:
                    advance((position + done) / len(chunks))
            self.passes, self.batches = self.passes + 1, number
        return collected

    def _chunks(self, graph: Graph, taps: list[Tap]) -> list[list[Tap]]:
        """Return the taps in groups that stay within the memory, in their order."""
        if self._memory is None:
            return [taps]
        model = tapped(graph, taps, shapes=True)
        session = open_session(graph, model, optimize=False, threads=self._threads)
        names = [output.name for output in model.graph.output]
        shapes = run(graph, session, self._data.first(), names)
        chunks: list[list[Tap]] = [[]]
        left = self._memory
        for tap, shape in zip(taps, shapes, strict=True):
            size = math.prod(shape.tolist()) * (tap.element or np.dtype(np.float64)).itemsize
            if chunks[-1] and size > left:
                chunks.append([])
                left = self._memory
            chunks[-1].append(tap)
            left -= size
        return chunks


def tapped(graph: Graph, taps: list[Tap], *, shapes: bool = False) -> onnx.ModelProto:
    """Return a model that computes values of another, and what they depend on, and nothing else.

    Args:
        graph: The other model. Tensors that have their data in files refer to these files still.
        taps: The values, which become the outputs in this order.
        shapes: Whether the outputs are their shapes instead.
    """
    outputs: list[str] = []
    added: list[onnx.NodeProto] = []
    for tap in taps:
        operator, attributes = _operator(graph, tap, shapes)
        if not operator:
            outputs.append(tap.value)
            continue
        outputs.append(_free_name(graph, f"{tap.value}/tap"))
        added.append(helper.make_node(operator, [tap.value], [outputs[-1]], **attributes))
    needed = {tap.value for tap in taps}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(values_used(node))
    whole, model = graph.model, onnx.ModelProto()
    model.ir_version = whole.ir_version
    model.opset_import.extend(whole.opset_import)
    model.functions.extend(whole.functions)
    part = model.graph
    part.name = "taps"
    part.node.extend([*reversed(nodes), *added])
    part.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in needed)
    part.sparse_initializer.extend(s for s in whole.graph.sparse_initializer if s.values.name in needed)
    # The feeds have all inputs of the model, so inputs that no value depends on stay too.
    wanted = graph.inputs.keys() | needed
    part.input.extend(entry for entry in whole.graph.input if entry.name in wanted)
    part.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return model


def _operator(graph: Graph, tap: Tap, shapes: bool) -> tuple[str, dict[str, Any]]:
    """Return the operator that makes an output of a value, and its attributes; "" if it can be one itself."""
    if shapes:
        return "Shape", {}
    if tap.element == _BFLOAT16:  # which ONNX Runtime does not hand over as an array
        return "Cast", {"to": TensorProto.FLOAT}
    return ("", {}) if tap.value in graph.producer else ("Identity", {})


def _free_name(graph: Graph, wanted: str) -> str:
    taken = graph.producer.keys() | graph.initializers.keys() | graph.inputs.keys()
    while wanted in taken:
        wanted += "_"
    return wanted
