"""Networks as ONNX models: the same results as layer by layer, and batch norms that are read back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import batchnorm as bn
import cases
from batchnorm.onnx import Activation, Conv, Fused, Linear, export_network, frozen_layers
from onnx_models import NEWEST_IN_RUNTIME, run

FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def norm_of(rng, channels, dtype="float32", channel_axis=1):
    mean, var, gamma, beta = cases.parameters(rng, channels)
    return bn.FrozenBatchNorm(
        mean.astype(dtype), var.astype(dtype), gamma, beta, dtype=dtype, channel_axis=channel_axis
    )


def convolved(x, layer):
    """A literal convolution of x (N, C, H, W)."""
    weight, groups = np.asarray(layer.weight, float), layer.groups
    (sh, sw), (ph, pw), (dh, dw) = (
        np.broadcast_to(v, 2) for v in (layer.stride, layer.padding, layer.dilation)
    )
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    outputs, inputs, kh, kw = weight.shape
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((len(x), outputs, height, width))
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        for i in range(height):
            for j in range(width):
                patch = x[:, first : first + inputs, i * sh :: dh, j * sw :: dw][:, :, :kh, :kw]
                y[:, o, i, j] = (patch * weight[o]).sum((1, 2, 3))
    return y if layer.bias is None else y + np.asarray(layer.bias)[:, None, None]


def expected(layers, x):
    """The results of the layers, one by one, in float64."""
    results = {"x": x.astype(np.float64)}
    value = results["x"]
    for name, layer in layers.items():
        if isinstance(layer, Linear):
            value = value @ np.asarray(layer.weight).T + (0 if layer.bias is None else layer.bias)
        elif isinstance(layer, Conv):
            value = convolved(value, layer)
        elif isinstance(layer, Activation):
            value = FUNCTIONS[layer.function](value)
        else:
            fused = layer if isinstance(layer, Fused) else Fused(layer)
            p = fused.layer.freeze(dtype="float64") if isinstance(fused.layer, bn.BatchNorm) else fused.layer
            wide = bn.FrozenBatchNorm(
                p.mean, p.var, p.gamma, p.beta, eps=p.eps, channel_axis=p.channel_axis, dtype="float64"
            )
            value = wide(value)
            if fused.residual:
                value = value + results[fused.residual]
            if fused.activation:
                value = FUNCTIONS[fused.activation](value)
        results[name] = value
    return value


def dense(rng, norm=norm_of):
    return {
        "first": Linear(rng.normal(size=(8, 5))),
        "norm1": norm(rng, 8),
        "act1": Activation("sigmoid"),
        "second": Linear(rng.normal(size=(8, 8)), rng.normal(size=8)),
        "norm2": Fused(norm(rng, 8), "relu", "act1"),
        "third": Linear(rng.normal(size=(8, 8))),
        "norm3": Fused(norm(rng, 8), "relu6"),
        "last": Linear(rng.normal(size=(3, 8)), rng.normal(size=3)),
    }


def images(rng):
    return {
        "conv1": Conv(rng.normal(size=(6, 4, 3, 3)), rng.normal(size=6), stride=2, padding=1),
        "bn1": Fused(norm_of(rng, 6), "relu6"),
        "depthwise": Conv(rng.normal(size=(6, 1, 3, 3)), padding=1, groups=6),
        "bn2": Fused(norm_of(rng, 6), "relu", "bn1"),
        "dilated": Conv(rng.normal(size=(4, 3, 3, 2)), None, (1, 2), (2, 0), groups=2, dilation=(2, 1)),
        "bn3": norm_of(rng, 4),
        "relu": Activation("relu"),
    }


@pytest.mark.parametrize("opset", range(9, NEWEST_IN_RUNTIME + 1))
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_dense_networks(rng, opset, dtype):
    layers = dense(rng)
    model = export_network(layers, ("rows", 5), opset=opset, dtype=dtype)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    x = rng.normal(size=(20, 5)).astype(dtype)
    (y,) = run(model, {"x": x})
    assert y.dtype == x.dtype
    tolerance = {"float16": 0.1, "float32": 1e-4, "float64": 1e-4}[dtype]
    np.testing.assert_allclose(y, expected(layers, x), rtol=tolerance, atol=tolerance)
    assert frozen_layers(model) == {
        "norm1": layers["norm1"],
        **{k: layers[k].layer for k in ("norm2", "norm3")},
    }


@pytest.mark.parametrize("shape", [("n", 4, 11, 9), ("n", 4, None, "width"), (3, 4, 11, 9)])
@pytest.mark.parametrize("opset", [9, 13, 26])
def test_convolutions(rng, shape, opset):
    layers = images(rng)
    model = export_network(layers, shape, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    x = rng.normal(size=(3, 4, 11, 9)).astype(np.float32)
    (y,) = run(model, {"x": x})
    wanted = expected(layers, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    dims = model.graph.output[0].type.tensor_type.shape.dim
    fixed = [d.dim_value for d in dims if d.HasField("dim_value")]
    assert fixed == {3: [3, *wanted.shape[1:]], "n": list(wanted.shape[1:])}[shape[0]] or shape[2] is None
    assert set(frozen_layers(model)) == {"bn1", "bn2", "bn3"}
    properties = {prop.key: prop.value for prop in model.metadata_props}
    assert properties["batchnorm.bn3.fingerprint"] == layers["bn3"].fingerprint
    assert properties["batchnorm.version"] == bn.__version__


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions_of_any_number_of_axes(rng, spatial):
    layers = [Conv(rng.normal(size=(4, 3, *[3] * spatial))), norm_of(rng, 4)]
    model = export_network(layers, (2, 3, *[5] * spatial))
    onnx.checker.check_model(model, full_check=True)
    (y,) = run(model, {"x": rng.normal(size=(2, 3, *[5] * spatial)).astype(np.float32)})
    assert y.shape == (2, 4, *[3] * spatial)


def test_a_dense_layer_of_more_axes_is_matmul_and_add(rng):
    layers = {"a": Linear(rng.normal(size=(6, 5)), rng.normal(size=6)), "b": norm_of(rng, 6, channel_axis=-1)}
    model = export_network(layers, ("n", None, 5))
    operators = [node.op_type for node in model.graph.node]
    assert operators == ["MatMul", "Add", "Transpose", "BatchNormalization", "Transpose"]
    x = rng.normal(size=(2, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x})[0], expected(layers, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_keep_their_parameters_in_networks_of_16_bits(rng, dtype):
    norm = norm_of(rng, 4)
    model = export_network([norm, Activation("relu")], ("n", 4), dtype=dtype, opset=15)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Cast", "BatchNormalization", "Cast", "Relu"]
    assert frozen_layers(model) == {"batchnorm_0": norm}


def test_a_trainable_layer_in_eval_mode(rng):
    layer = bn.BatchNorm(3)
    layer(rng.normal(size=(50, 3)).astype(np.float32))
    with pytest.raises(ValueError, match="norm: is in train mode, wanted eval mode"):
        export_network({"norm": layer}, ("n", 3))
    layer.eval()
    model = export_network({"norm": Fused(layer, "relu", "x")}, ("n", 3))
    x = rng.normal(size=(9, 3)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x})[0], layer(x, "relu", x), rtol=1e-5, atol=1e-5)
    assert frozen_layers(model) == {"norm": layer.freeze()}


def test_names_without_names_and_the_same_bytes(rng):
    layers = [
        Linear(np.eye(3)), norm_of(rng, 3), Activation("relu"), Fused(norm_of(rng, 3), "relu6", "x"),
    ]  # fmt: skip
    models = [export_network(layers, ("n", 3), x="pixels" if k else "x", y="logits") for k in (0, 0)]
    first, second = (model.SerializeToString() for model in models)
    assert first == second
    (model, _) = models
    names = [node.name for node in model.graph.node]
    assert names == [
        "linear_0", "batchnorm_1", "relu_2", "batchnorm_3", "batchnorm_3.sum", "batchnorm_3.relu",
        "batchnorm_3.relu6",
    ]  # fmt: skip
    assert model.graph.output[0].name == "logits"


NORM = bn.FrozenBatchNorm([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize(
    ("layers", "shape", "match"),
    [
        ([], ("n", 3), "layers: was empty, wanted one layer or more"),
        ([Linear(np.ones((2, 4)))], ("n", 3), r"linear_0: x was of shape \('n', 3\), wanted 4 on axis -1"),
        ([Linear(np.ones(3))], ("n", 3), r"linear_0: weight was of shape \(3,\), wanted \(outputs, inputs\)"),
        ([Linear(np.ones((2, 3)), np.ones(3))], ("n", 3), r"linear_0: bias was of shape \(3,\), wanted"),
        ([Linear([[np.inf, 1, 2]])], ("n", 3), "linear_0: weight is beyond float32"),
        ([Linear([[1e39, 1, 2]])], ("n", 3), "linear_0: weight is beyond float32"),
        ([Linear(np.ones((2, 3)))], (3,), "linear_0: x was of shape"),
        ([NORM], ("n", 4), r"batchnorm_0: x was of shape \('n', 4\), wanted 3 on axis 1"),
        ([NORM], ("n",), "rank: was 1, wanted 2 to 64"),
        ([Conv(np.ones((2, 3, 3)))], ("n", 3, 5, 5), "conv_0: weight was of shape .*, wanted 4 axes"),
        ([Conv(np.ones((2, 3, 3)))], ("n", 3, 2), "conv_0: a kernel of 3 does not fit 2 values on axis 2"),
        ([Conv(np.ones((2, 3, 3)), groups=3)], ("n", 9, 9), "conv_0: groups was 3, wanted a divisor of 2"),
        ([Conv(np.ones((2, 3, 3)), groups=2)], ("n", 3, 9), "conv_0: x was of shape .*, wanted 6 on axis 1"),
        ([Conv(np.ones((2, 3, 3)), stride=0)], ("n", 3, 9), "conv_0: stride was 0, wanted 1 numbers, 1 or"),
        ([Conv(np.ones((2, 3, 3)), padding=(1, 2))], ("n", 3, 9), "conv_0: padding was .*, wanted 1 numbers"),
        ([Activation("tanh")], ("n", 3), "tanh_0: was 'tanh', wanted 'relu' or 'relu6' or 'sigmoid'"),
        ([Fused(NORM, "sigmoid")], ("n", 3), "batchnorm_0: was 'sigmoid', wanted 'relu' or 'relu6'"),
        ([Fused(NORM, residual="y")], ("n", 3), "batchnorm_0: residual was 'y', wanted one of 'x'"),
        (
            [Linear(np.ones((3, 2))), Fused(NORM, residual="x")],
            ("n", 2),
            r"batchnorm_1: residual 'x' was of shape \('n', 2\), wanted \('n', 3\)",
        ),
        ({"x": NORM}, ("n", 3), "layers: name was 'x', wanted one that no other layer"),
        ({"": NORM}, ("n", 3), "layers: name was '', wanted"),
        ({"a": NORM, "a.normalized": NORM}, ("n", 3), None),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_the_name_of_the_layer(layers, shape, match):
    if match is None:
        onnx.checker.check_model(export_network(layers, shape), full_check=True)
        return
    with pytest.raises(ValueError, match=match):
        export_network(layers, shape)


def test_wrong_types():
    with pytest.raises(TypeError, match="tuple_0: was tuple, wanted Linear, Conv"):
        export_network([(1, 2)], ("n", 3))
    with pytest.raises(TypeError, match="batchnorm_0: layer was str, wanted FrozenBatchNorm or BatchNorm"):
        export_network([Fused("bn")], ("n", 3))
    with pytest.raises(TypeError, match=r"opset: was 15\.0, wanted an integer"):
        export_network([NORM], ("n", 3), opset=15.0)
    with pytest.raises(TypeError, match="dtype: was 'int8'"):
        export_network([NORM], ("n", 3), dtype="int8")
    with pytest.raises(ValueError, match="opset: was 8, wanted 9 to"):
        export_network([NORM], ("n", 3), opset=8)
