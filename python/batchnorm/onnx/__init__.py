"""ONNX models: batch normalizations read from them, put back, and checked.

This package needs the extra `batchnorm[onnx]`.
"""

from __future__ import annotations

try:
    import onnx as _onnx  # noqa: F401  (imported to name what is missing)
except ImportError as error:
    raise ImportError("batchnorm.onnx needs the package onnx: pip install 'batchnorm[onnx]'") from error

from batchnorm.onnx.affine import Affine, affines
from batchnorm.onnx.findings import Finding
from batchnorm.onnx.inference_mode import fix
from batchnorm.onnx.lint import lint
from batchnorm.onnx.read import frozen_layers, load_frozen
from batchnorm.onnx.replace import replace_layers

__all__ = ["Affine", "Finding", "affines", "fix", "frozen_layers", "lint", "load_frozen", "replace_layers"]
