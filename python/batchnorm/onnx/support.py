"""Which BatchNormalization nodes runtimes refuse, as tests/test_onnx_lint_runtimes.py measures it."""

from __future__ import annotations

from batchnorm.onnx.graph import Graph

_ONNX_RUNTIME, _OPENVINO = "ONNX Runtime 1.31 (CPU)", "OpenVINO 2026.4 (CPU)"
_OPSETS = range(7, 27)  # of ONNX Runtime
_NEWEST_IR = 13  # of ONNX Runtime
_MIXED = {"float16", "float32"}  # ONNX Runtime takes any mix of these


def model_refused(graph: Graph) -> str:
    """Return why a runtime refuses a model with a BatchNormalization, or "" if none does.

    OpenVINO takes all opsets and IR versions.
    """
    if graph.opset not in _OPSETS:
        return f"{_ONNX_RUNTIME} takes opsets {_OPSETS[0]} to {_OPSETS[-1]}, not {graph.opset}"
    if graph.model.ir_version > _NEWEST_IR:
        return f"{_ONNX_RUNTIME} takes IR versions up to {_NEWEST_IR}, not {graph.model.ir_version}"
    return ""


def types_refused(x: str, parameters: dict[str, str]) -> str:
    """Return which runtimes refuse a node in inference mode for its types, or "" if none does.

    Args:
        x: The type of x.
        parameters: The types of the parameters by role.
    """
    types = {x, *parameters.values()}
    one = len(types) == 1
    refusing = []
    if not (types <= _MIXED or types == {"float64"}):
        refusing.append(_ONNX_RUNTIME)
    if not one:
        refusing.append(_OPENVINO)
    if not refusing:
        return ""
    found = x if one else f"x of {x} with {', '.join(f'{role} {kind}' for role, kind in parameters.items())}"
    return f"{' and '.join(refusing)} refuse{'s' if len(refusing) == 1 else ''} {found}"
