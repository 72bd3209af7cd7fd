"""New statistics for the batch normalizations of a model, measured over calibration data."""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray

from batchnorm._checks import channels_where, integer, number
from batchnorm._core import Moments
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.onnx.calibration import AGAIN, Batches, Calibration
from batchnorm.onnx.edit import Editor, narrowed
from batchnorm.onnx.fingerprints import renew_fingerprints
from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.nodes import values_used
from batchnorm.onnx.normalizations import (
    OLDEST_IN_RUNTIME,
    OPERATOR,
    PARAMETERS,
    Reading,
    normalizations,
    read,
)
from batchnorm.onnx.outputs import outcome, wanted_outputs
from batchnorm.onnx.read import read_all
from batchnorm.onnx.recalibration import RecalibratedLayer, Recalibration
from batchnorm.onnx.taps import Advance, Collected, Meter, Statistics, Tap
from batchnorm.shift import shift

Population: TypeAlias = Literal["algorithm2", "pooled"]

_NAMED = 4  # layers with constant channels that a warning names; the report has all
_CONVERT_TO = 15  # an opset that ONNX Runtime has had for long
_FEW_EXAMPLES = 32  # in a batch, below which the variance between batches is no small part


def recalibrate(
    model: ModelSource,
    batches: Batches,
    *,
    layerwise: bool = False,
    population: Population | None = None,
    blend: float = 1.0,
    batch_size: int | None = None,
    memory: int | None = None,
    threads: int = 1,
    labels: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    skip: bool = False,
    out: str | os.PathLike[str] | None = None,
    progress: Advance = lambda fraction: None,
) -> tuple[onnx.ModelProto, Recalibration]:
    """Return a copy of a model whose batch normalizations have the statistics of calibration data.

    The model is run over the data in ONNX Runtime, and the input of each BatchNormalization of the main graph
    is measured. Its mean and unbiased variance (as PyTorch stores it) are written into the copy, in the types
    of the model. γ, β, ε and all else stay. Statistics that several nodes share, or that are no initializer,
    become new initializers, named `<old name>/<name of the node>`. Old statistics may be impossible, such as
    negative variances. Fingerprints in the metadata that the
    exports of this package have written are renewed, or removed.

    There are two populations. Over batches b, of m_b values in a channel with mean μ_b and sum of squared
    deviations M2_b, they are:

    - "algorithm2": E[x] = Σ m_b·μ_b / Σ m_b, Var[x] = Σ M2_b / Σ (m_b − 1), the variance *within* batches
      (Ioffe and Szegedy 2015, Algorithm 2, step 10). It depends on how the data are cut into batches.
    - "pooled": the mean and the variance M2/(n − 1) of all n values together, which includes the variance
      *between* batches. It does not depend on how the data are cut, but for rounding.

    Args:
        model: The model, its path, or its bytes. If it has data in other files, it must be the path.
        batches: Calibration data. Examples along axis 0, to be cut into batches: an array, a dict of arrays
            by input name, or a path or list of paths of .npy (for a model of one input), of .npz (arrays by
            input name) or of folders of these. Or batches: an iterable of arrays or dicts of arrays by input
            name, or a callable that returns one.
        layerwise: Measure layer after layer in topological order, each with the new statistics of those
            before it in place. Otherwise all are measured with the old statistics before them.
        population: "algorithm2" or "pooled". None is "pooled" if the model fixes its batch axis below 32 or
            a batch has one value in a channel of a layer, else "algorithm2".
        blend: The weight w of what is measured, 0 < w <= 1: new = (1 − w)·old + w·measured.
        batch_size: Examples of a batch, where data are cut. None is the size that the model fixes, or 32.
        memory: Most bytes of inputs of layers that are held for one batch. If all together have more, the
            data are gone over once for each chunk of layers. None is no limit.
        threads: Number of threads of an operator of ONNX Runtime, on which rounding may depend.
        labels: The class of each example of the data, integers, to be compared with the first output, before
            and after; the classes are on its axis 1.
        reference: Wanted values of the first output for all data, to be compared likewise.
        skip: Leave out, with a warning, batch normalizations that cannot be recalibrated.
        out: File to write the result to. If the model has data in other files, they are copied to one beside
            it, `<out>.data`. A model of more than 2 GB needs this argument, and its path as `model`.
        progress: Is called with the fraction of the work that is done.

    Returns:
        The changed copy, and what has changed.

    Raises:
        ImportError: The package onnxruntime is not installed.
        OSError: A file cannot be read or written.
        ValueError: The model has no batch normalization, or one that cannot be recalibrated (see
            `frozen_layers`), or an opset that ONNX Runtime has none for; or an argument is out of its range;
            or a batch has other names or shapes than the model wants; or values before a layer are not
            finite, or too few; or statistics do not fit into the model's type, or would divide by 0; or the
            data can be gone over only once where that is not enough.
        TypeError: An argument is of another type, or a batch of another dtype than the model wants.

    Warns:
        UserWarning: Channels are constant over the data; examples fill no batch of the size that the model
            fixes; a parameter is an input of the model too, so that a caller may give another (from IR
            version 4 on); or what `skip` leaves out.
    """
    if population not in (None, "algorithm2", "pooled"):
        raise ValueError(f'population: was {population!r}, wanted "algorithm2", "pooled" or None')
    blend = number("blend", blend)
    if not 0 < blend <= 1:
        raise ValueError(f"blend: was {blend}, wanted 0 < blend <= 1")
    if memory is not None and integer("memory", memory) < 1:
        raise ValueError(f"memory: was {memory}, wanted 1 or more bytes")
    if integer("threads", threads) < 1:
        raise ValueError(f"threads: was {threads}, wanted 1 or more")
    graph = Graph(model)
    layers = _layers(graph, skip)
    if blend < 1 and (broken := [key for key, layer in layers.items() if layer.frozen is None]):
        found = f"the old statistics of {broken[0]!r} are negative or not finite"
        raise ValueError(f"blend: was {blend}, wanted 1, since {found}")
    data = Calibration(graph, batches, batch_size)
    wanted = wanted_outputs(labels, reference)
    if (layerwise or wanted) and not data.again:
        argument = "layerwise" if layerwise else next(iter(wanted))
        raise ValueError(f"{argument}: wants batches that can be gone over more than once; {AGAIN}")

    editor = Editor(graph)
    nodes = {entry.key: entry.node for entry in normalizations(editor.graph) if entry.key in layers}
    groups = _generations(editor.graph, nodes) if layerwise else [[*nodes]]
    stages = _Stages(progress, len(groups) + 2 * bool(wanted))
    before = outcome(graph, data, wanted, threads, stages.next()) if wanted else None
    meter = Meter(data, memory, threads)
    reason = "asked for"
    changed: dict[str, RecalibratedLayer] = {}
    for group in groups:
        # Where the population is not given, all layers are measured at first, since each has a say in it.
        measured = group if population else [*nodes]
        taps = [_tap(graph, key, nodes[key], layers[key]) for key in measured]
        collected = meter.measure(editor.graph, taps, stages.next())
        if population is None:
            population, reason = _choice(data.fixed, collected)
        for key in group:
            node = nodes[key]
            statistics = collected[node.input[0]].statistics(population)
            changed[key] = _write(editor, key, node, layers[key], statistics, blend)
        editor.refresh()
    after = outcome(editor.graph, data, wanted, threads, stages.next()) if wanted else None
    renew_fingerprints(editor.model, {key: read(editor.graph, nodes[key]).layer() for key in nodes})
    in_order = tuple(changed[key] for key in nodes)
    _warn(graph.where, in_order, data.left_out)
    report = Recalibration(
        layers=in_order,
        population=str(population),
        reason=reason,
        layerwise=layerwise,
        blend=blend,
        batches=meter.batches,
        left_out=data.left_out,
        passes=meter.passes,
        memory=meter.peak,
        before=before,
        after=after,
    )
    return editor.finish(out), report


class _Stages:
    """Makes of the progress of each stage that of all of them, which are equally long."""

    def __init__(self, progress: Advance, count: int) -> None:
        self._progress, self._count, self._begun = progress, count, 0

    def next(self) -> Advance:
        """Begin the next stage, and return what is to be called with its progress."""
        start, self._begun = self._begun, self._begun + 1
        return lambda fraction: self._progress((start + fraction) / self._count)


class _Old(NamedTuple):
    """A layer as it is in the model: without `frozen` if its statistics are impossible."""

    channels: int
    eps: float
    frozen: FrozenBatchNorm | None


def _old(reading: Reading) -> _Old:
    try:
        layer = frozen = reading.layer()
    except ValueError:  # raised again if it is not for the statistics, which are measured anew
        zeros, ones = np.zeros_like(reading.mean), np.ones_like(reading.var)
        layer, frozen = reading._replace(mean=zeros, var=ones).layer(), None
    return _Old(layer.channels, layer.eps, frozen)


def _layers(graph: Graph, skip: bool) -> dict[str, _Old]:
    """Return the layers to recalibrate, as they are in the model."""
    if graph.nodes(OPERATOR) and graph.opset < OLDEST_IN_RUNTIME:
        found = f"ONNX Runtime has no {OPERATOR} of opset {graph.opset}"
        remedy = f"onnx.version_converter.convert_version(model, {_CONVERT_TO})"
        raise ValueError(f"{graph.where}: {found}; convert the model first: {remedy}")
    layers = read_all(graph, _old, skip)
    if not layers and (nodes := graph.nodes(OPERATOR)):
        raise ValueError(f"{graph.where}: none of its {len(nodes)} {OPERATOR} nodes can be recalibrated")
    if not layers:
        raise ValueError(
            f"{graph.where}: the main graph has no {OPERATOR} to recalibrate; where they were folded into "
            "other layers, their statistics are gone: recalibrate before folding"
        )
    return layers


def _generations(graph: Graph, nodes: dict[str, onnx.NodeProto]) -> list[list[str]]:
    """Return the layers in groups that depend on those in the groups before, and not on each other.

    To measure a group at once is the same as to measure its layers one by one.
    """
    keys = {node.output[0]: key for key, node in nodes.items()}
    generations: list[list[str]] = []
    layers_before: dict[str, int] = {}  # the most layers on a way from the inputs to a value
    for node in graph.model.graph.node:
        count = max((layers_before.get(value, 0) for value in values_used(node)), default=0)
        if node.output and (key := keys.get(node.output[0])):
            if count == len(generations):
                generations.append([])
            generations[count].append(key)
            count += 1
        layers_before.update(dict.fromkeys(node.output, count))
    return generations


def _tap(graph: Graph, key: str, node: onnx.NodeProto, layer: _Old) -> Tap:
    value = node.input[0]
    return Tap(value, key, layer.channels, graph.elements.get(value))


def _choice(fixed: int | None, collected: dict[str, Collected]) -> tuple[Population, str]:
    """Return the population where none was asked for, and the reason."""
    if fixed is not None and fixed < _FEW_EXAMPLES:
        return "pooled", f"the model fixes its batch axis at {fixed}, below {_FEW_EXAMPLES}"
    for found in collected.values():
        if found.single:
            return "pooled", f"batch {found.single} has one value in a channel before {found.layer!r}"
    axis = "does not fix its batch axis" if fixed is None else f"fixes its batch axis at {fixed}"
    return "algorithm2", f"the model {axis}, and every batch has 2 or more values in a channel"


def _write(
    editor: Editor,
    key: str,
    node: onnx.NodeProto,
    layer: _Old,
    measured: Statistics,
    blend: float,
) -> RecalibratedLayer:
    """Write the new statistics of a layer into a node of the editor's copy, and return what changes."""
    where = f"{editor.graph.where}: {key!r}"
    old = read(editor.graph, node)
    new: dict[str, NDArray[np.float64]] = {}
    for role in ("mean", "var"):
        before: NDArray[Any] = getattr(old, role)
        values = getattr(measured, role)
        if blend < 1:
            values = (1 - blend) * before.astype(np.float64) + blend * values
        after = narrowed(role, values, before.dtype, where)
        new[role] = after.astype(np.float64)
        if after.tobytes() != before.tobytes():
            editor.write(node, PARAMETERS.index(role) + 1, after, key)
    if layer.eps == 0 and (bad := channels_where(new["var"] == 0)):
        raise ValueError(
            f"{where}: eps is 0, and so is the measured variance in {bad}, by which x is divided"
        )
    live = Moments(count=measured.count, mean=new["mean"], m2=new["var"] * (measured.count - 1))
    return RecalibratedLayer(
        name=key,
        channels=layer.channels,
        values=int(measured.count[0]),
        shift=None if layer.frozen is None else shift(live, layer.frozen),
        constant=tuple(np.flatnonzero(measured.var == 0).tolist()),
    )


def _warn(where: str, changed: tuple[RecalibratedLayer, ...], left_out: int) -> None:
    constant = []
    for layer in changed:
        if layer.constant:
            channels = channels_where(np.isin(np.arange(layer.channels), layer.constant))
            constant.append(f"{channels} of {layer.name!r}")
    if constant:
        more = f" and in {len(constant) - _NAMED} more layers" if len(constant) > _NAMED else ""
        found = "; ".join(constant[:_NAMED]) + more
        warnings.warn(f"{where}: constant over the data: {found}", stacklevel=3)
    if left_out:
        message = f"batches: {left_out} examples at the end fill no batch of the model and were left out"
        warnings.warn(message, stacklevel=3)
