"""ONNX Runtime, as this package runs models in it: on the CPU, with errors that name the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray

from batchnorm.onnx.graph import Graph
from batchnorm.onnx.tensors import external_tensors

if TYPE_CHECKING:
    import onnxruntime

_FOLDER_OF_TENSORS = "session.model_external_initializers_file_folder_path"


def open_session(
    graph: Graph, model: onnx.ModelProto | None = None, *, optimize: bool = True, threads: int = 1
) -> onnxruntime.InferenceSession:
    """Load a model into ONNX Runtime.

    Args:
        graph: The model, which says where its tensors have their data.
        model: A changed copy of it, to be loaded in its place.
        optimize: Whether ONNX Runtime may optimize the graph. If not, each operator is computed by itself.
        threads: Number of threads of an operator; its results may depend on it.

    Raises:
        ImportError: The package onnxruntime is not installed.
        OSError: A file with data of the model cannot be read.
        ValueError: ONNX Runtime refuses the model, or data of the model are outside its folder.
    """
    try:
        import onnxruntime
    except ImportError as error:
        message = "needs the package onnxruntime: pip install 'batchnorm[onnxruntime]'"
        raise ImportError(message, name="onnxruntime") from error
    model = graph.model if model is None else model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only: its warnings are about the model, and go to standard error
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if external := external_tensors(model):
        for tensor in external:  # a file outside the folder is not left for ONNX Runtime to find
            graph.tensors.place(tensor, repr(tensor.name))
        options.add_session_config_entry(_FOLDER_OF_TENSORS, str(graph.folder))
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of many types without a common one
        raise ValueError(f"{graph.where}: ONNX Runtime refuses the model: {_line(error)}") from error


def run(
    graph: Graph, session: onnxruntime.InferenceSession, feeds: dict[str, NDArray[Any]], names: list[str]
) -> list[Any]:
    """Return the named outputs of a model for one batch of inputs.

    Raises:
        ValueError: ONNX Runtime cannot compute them.
    """
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # of many types without a common one
        raise ValueError(f"{graph.where}: ONNX Runtime cannot run the model: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
