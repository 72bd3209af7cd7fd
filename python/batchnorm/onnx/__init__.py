"""ONNX models: batch normalizations read from them, put back, and checked.

This package needs the extra `batchnorm[onnx]`.
"""

from __future__ import annotations

try:
    import onnx as _onnx  # noqa: F401  (imported to name what is missing)
except ImportError as error:
    raise ImportError("batchnorm.onnx needs the package onnx: pip install 'batchnorm[onnx]'") from error

from batchnorm.onnx.affine import Affine, affines
from batchnorm.onnx.compare import OutputError
from batchnorm.onnx.findings import Finding
from batchnorm.onnx.fold import FoldedNode, FoldReport, InexactFoldError, fold
from batchnorm.onnx.inference_mode import fix
from batchnorm.onnx.lint import lint
from batchnorm.onnx.network import Activation, Conv, Fused, Linear, export_network
from batchnorm.onnx.outputs import Outcome
from batchnorm.onnx.read import frozen_layers, load_frozen
from batchnorm.onnx.recalibrate import recalibrate
from batchnorm.onnx.recalibration import RecalibratedLayer, Recalibration
from batchnorm.onnx.replace import replace_layers
from batchnorm.onnx.verify import Errors, Verification, verify

__all__ = [
    "Activation",
    "Affine",
    "Conv",
    "Errors",
    "Finding",
    "FoldReport",
    "FoldedNode",
    "Fused",
    "InexactFoldError",
    "Linear",
    "Outcome",
    "OutputError",
    "RecalibratedLayer",
    "Recalibration",
    "Verification",
    "affines",
    "export_network",
    "fix",
    "fold",
    "frozen_layers",
    "lint",
    "load_frozen",
    "recalibrate",
    "replace_layers",
    "verify",
]
