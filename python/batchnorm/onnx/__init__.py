"""All that knows ONNX. `FrozenBatchNorm.to_onnx` is the way out, `load_frozen` the way in.

Needs the extra `batchnorm[onnx]`.
"""

from __future__ import annotations

try:
    import onnx as _onnx  # noqa: F401  (only to say what is missing)
except ImportError as error:
    raise ImportError("batchnorm.onnx needs the package onnx: pip install 'batchnorm[onnx]'") from error

from batchnorm.onnx.read import load_frozen

__all__ = ["load_frozen"]
