"""Frozen layers in ONNX models: `load_frozen` reads one, `to_onnx` of the layer writes one.

This package needs the extra `batchnorm[onnx]`.
"""

from __future__ import annotations

try:
    import onnx as _onnx  # noqa: F401  (imported to name what is missing)
except ImportError as error:
    raise ImportError("batchnorm.onnx needs the package onnx: pip install 'batchnorm[onnx]'") from error

from batchnorm.onnx.read import load_frozen

__all__ = ["load_frozen"]
