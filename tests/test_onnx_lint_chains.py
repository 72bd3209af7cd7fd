"""`batchnorm.onnx.lint`: which batch normalizations could be folded into a neighbour, and which not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_models import batch_norm, make, parameters
from test_onnx_lint import RNG, names, only


def node(operator, *inputs, output, **attributes):
    return helper.make_node(operator, inputs, [output], name=f"the {operator}", **attributes)


W2, W4 = np.ones((3, 3), np.float32), np.ones((3, 3, 1, 1), np.float32)
IMAGE = {"x": ("n", 3, 5, 5)}
BY_CHANNEL = np.ones((3, 1, 1), np.float32)
CHAINS = {  # nodes, constants, shapes, neighbour
    "Conv": ([node("Conv", "x", "w", output="h"), batch_norm("h")], {"w": W4}, IMAGE),
    "ConvTranspose": ([node("ConvTranspose", "x", "w", output="h"), batch_norm("h")], {"w": W4}, IMAGE),
    "Gemm": ([node("Gemm", "x", "w", "b", output="h"), batch_norm("h")], {"w": W2, "b": W2[0]}, {}),
    "MatMul": ([node("MatMul", "x", "w", output="h"), batch_norm("h")], {"w": W2}, {}),
    "Add": (
        [node("MatMul", "x", "w", output="p"), node("Add", "p", "b", output="h"), batch_norm("h")],
        {"w": W2, "b": W2[0]},
        {},
    ),
    "BatchNormalization": (
        [batch_norm(y="h", prefix="b.", name="the BatchNormalization"), batch_norm("h")],
        parameters(RNG, prefix="b."),
        {},
    ),
    "Mul after": ([batch_norm(y="h"), node("Mul", "h", "w", output="y")], {"w": BY_CHANNEL}, IMAGE),
    "Add after": ([batch_norm(y="h"), node("Add", "w", "h", output="y")], {"w": np.ones(1, "f")}, IMAGE),
    "Conv after": ([batch_norm(y="h"), node("Conv", "h", "w", output="y")], {"w": W4}, IMAGE),
    "Gemm after": ([batch_norm(y="h"), node("Gemm", "h", "w", output="y")], {"w": W2}, {}),
    "MatMul after": ([batch_norm(y="h"), node("MatMul", "h", "w", output="y")], {"w": W2}, {}),
}


def chain(name):
    nodes, constants, shapes = CHAINS[name]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    rank = len(shapes.get("x", "nc"))
    return make(copies, constants | parameters(RNG), y=tuple("abcd"[:rank]), **shapes)


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    model = chain(name)
    onnx.checker.check_model(model, full_check=True)
    operator = name.split()[0]
    assert only(model, "unfolded").message == f"could be folded into {operator} 'the {operator}'"


@pytest.mark.parametrize("name", CHAINS)
def test_values_that_are_read_elsewhere_are_not_folded(name):
    model = chain(name)
    output = helper.make_tensor_value_info("h", TensorProto.FLOAT, None)
    model.graph.output.append(output)
    assert names(model) == []
    model = chain(name)
    model.graph.node.append(node("Relu", "h", output="elsewhere"))
    assert names(model) == []


@pytest.mark.parametrize("name", [name for name in CHAINS if name != "BatchNormalization"])
def test_weights_that_are_not_the_nodes_own_are_not_folded(name):
    """A caller may give others."""
    model = chain(name)
    shape = list(model.graph.initializer[0].dims)
    assert model.graph.initializer[0].name == "w"
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, shape))
    assert names(model) == []
    del model.graph.initializer[0]
    assert names(model) == []


def changed_chain(name, index, *, inputs=None, **attributes):
    model = chain(name)
    changed_node = model.graph.node[index]
    changed_node.attribute.extend(helper.make_attribute(*entry) for entry in attributes.items())
    for position, value in (inputs or {}).items():
        changed_node.input[position] = value
    return model


def shared_weights():
    model = chain("Conv")
    model.graph.node.insert(0, node("Conv", "x", "w", output="other"))
    return model


def rank_three(name):
    model = chain(name)
    for entry in (*model.graph.input, *model.graph.output):
        entry.CopyFrom(helper.make_tensor_value_info(entry.name, TensorProto.FLOAT, ["n", 3, 3]))
    return model


def with_constant(name, values):
    model = chain(name)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
    return model


NOT_FOLDED = {
    "padded": changed_chain("Conv after", 1, pads=[0, 0, 1, 0]),
    "padded by rule": changed_chain("Conv after", 1, auto_pad="SAME_UPPER"),
    "weights read twice": shared_weights(),
    "MatMul of rank 3": rank_three("MatMul"),
    "MatMul of rank 3 after": rank_three("MatMul after"),
    "Gemm of the transpose": changed_chain("Gemm after", 1, transA=1),
    "as the weights": changed_chain("Conv after", 1, inputs={0: "w", 1: "h"}),
    "squared": changed_chain("Mul after", 1, inputs={1: "h"}),
    "not by channel": with_constant("Mul after", np.ones((1, 3, 5, 1), np.float32)),
    "by the last axis": with_constant("Mul after", np.ones(5, np.float32)),
    "of higher rank": with_constant("Mul after", np.ones((1, 1, 1, 1, 1), np.float32)),
    "training before": changed_chain("BatchNormalization", 0, training_mode=1),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_is_not_folded(name):
    assert [found for found in names(NOT_FOLDED[name]) if found != "training-mode"] == []


def test_chains_that_are_folded_with_more_around_them():
    assert names(changed_chain("Conv after", 1, auto_pad="VALID")) == ["unfolded"]
    model = chain("Conv")
    model.graph.node.insert(0, node("Shape", "w", output="sizes"))  # as PyTorch's exporter writes it
    assert names(model) == ["unfolded"]
    model = chain("Conv")
    model.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    assert names(model) == ["training-mode"]
