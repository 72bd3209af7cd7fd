"""Models that are made to do harm: endless, huge, deep, or with data in files that are none of theirs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_models import batch_norm, make, parameters

VALUES = parameters(np.random.default_rng(0))
ROLES = ("gamma", "beta", "mean", "var")


def node(operator, *inputs, output, **attributes):
    return helper.make_node(operator, inputs, [output], **attributes)


def with_mean(*nodes, constants=None):
    """A layer whose mean these nodes compute."""
    values = {role: values for role, values in VALUES.items() if role != "mean"}
    return make([*nodes, batch_norm()], values | (constants or {}))


def with_initializer(tensor):
    """A layer whose mean is this tensor."""
    model = with_mean()
    model.graph.initializer.append(tensor)
    return model


def nested(depth):
    """A model whose nodes If lie within each other."""
    model = make([batch_norm()], VALUES)
    graph = model.graph
    for _ in range(depth):
        inner = graph.node.add(op_type="If", input=["c"], output=["z"])
        graph = inner.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    graph.node.append(batch_norm(y="z"))
    return model


def nested_bytes(depth):
    """The file of such a model, which protobuf does not read."""
    data = b""
    for _ in range(depth):
        graph = _field(6, data)  # of an attribute
        attribute = _field(5, graph)  # of a node
        data = _field(1, attribute)  # of a graph
    return _field(7, data)


def _field(number, data):
    """A field of protobuf that holds a message."""
    length, size = b"", len(data)
    while True:
        size, low = size >> 7, size & 127
        length += bytes([low | (128 if size else 0)])
        if not size:
            return bytes([number << 3 | 2]) + length + data


def chain(operator, first, last, number):
    """So many nodes one behind the other."""
    names = [first, *(f"{last} {index}" for index in range(1, number)), last]
    return [node(operator, a, output=b) for a, b in itertools.pairwise(names)]


def pairs(number):
    """Pairs of Mul and Add one behind the other."""
    nodes = []
    for index in range(number):
        source = f"a{index - 1}" if index else "x"
        nodes.append(node("Mul", source, "gamma", output=f"m{index}"))
        nodes.append(node("Add", f"m{index}", "beta", output=f"a{index}"))
    return make(nodes, VALUES)


def sparse(dims, indices):
    model = with_mean()
    values = numpy_helper.from_array(np.ones(len(indices), np.float32), "mean")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(indices)), dims)
    )
    return model


def broadcast():
    """Constants that double in size, forty times."""
    nodes = [node("Expand", "one", "s1", output="e0")]
    for index in range(40):
        nodes.append(node("Expand", f"e{index}", f"s{index + 1}", output=f"e{index + 1}"))
    sizes = {f"s{k}": np.array(k * [2]) for k in range(1, 41)}
    return with_mean(*nodes, node("Identity", "e40", output="mean"), constants=sizes | {"one": np.float32(1)})


def long_vectors(size):
    """Yield models that cast a vector so long, which onnx may follow entry by entry: anywhere in a model."""
    vector = [node("ConstantOfShape", "s", output="b"), node("Cast", "b", output="c", to=TensorProto.DOUBLE)]
    sizes = {"s": np.array([size])}
    shape = [node("Shape", "x", output="one", start=1), node("CastLike", "c", "x", output="like")]
    layer = [node("Expand", "w", "one", output="mean"), batch_norm()]
    values = {role: values for role, values in VALUES.items() if role != "mean"} | {"w": np.float32(1)}
    yield "a vector", make([*vector, *shape, *layer], values | sizes)
    yield "an input", make([node("Cast", "x", output="c", to=7), batch_norm("c")], VALUES, x=(size,))
    branch = helper.make_graph(
        vector, "b", [], [helper.make_tensor_value_info("c", TensorProto.DOUBLE, None)]
    )
    choice = node("If", "t", output="z", then_branch=branch, else_branch=branch)
    yield "a branch", make([choice, *shape[:1], *layer], values | sizes | {"t": np.array(True)})
    model = make([node("F", "s", output="z", domain="d"), *shape[:1], *layer], values | sizes)
    model.opset_import.append(helper.make_opsetid("d", 1))
    model.functions.append(
        helper.make_function("d", "F", ["s"], ["c"], vector, [helper.make_opsetid("", 15)])
    )
    yield "a function", model


def models(nodes):
    """Yield name and model, the largest of so many nodes; each is made only when it is asked for."""
    yield "cycle", with_mean(node("Identity", "a", output="mean"), node("Identity", "mean", output="a"))
    yield "cycle of one", with_mean(node("Identity", "mean", output="mean"))
    yield "x from y", make([batch_norm("h"), node("Relu", "y", output="h")], VALUES)
    yield "mean from y", with_mean(node("Identity", "y", output="mean"))
    yield "computed twice", with_mean(node("Relu", "x", output="mean"), node("Relu", "x", output="mean"))
    yield "no nodes", make([], {})
    yield "empty", onnx.ModelProto()
    for role in ROLES:
        yield f"no {role}", make([batch_norm()], {k: v for k, v in VALUES.items() if k != role})
    for size in (2**28, 2**31, 2**60, 2**63 - 1, -1):
        sizes = {"s": np.array([size])}
        yield (
            f"ConstantOfShape {size}",
            with_mean(node("ConstantOfShape", "s", output="mean"), constants=sizes),
        )
        yield (
            f"Expand {size}",
            with_mean(
                node("Expand", "one", "s", output="mean"), constants=sizes | {"one": np.ones(1, np.float32)}
            ),
        )
        yield (
            f"initializer {size}",
            with_initializer(TensorProto(name="mean", data_type=1, dims=[size], raw_data=b"1234")),
        )
        yield f"sparse {size}", sparse([size], [0])
        yield f"sparse index {size}", sparse([3], [size])
        for dims in ([size, size], [size, 0]):
            yield f"initializer {dims}", with_initializer(TensorProto(name="mean", data_type=1, dims=dims))
            yield f"sparse {dims}", sparse(dims, [0])
    yield "2 to the 40", broadcast()
    yield (
        "copies of a broadcast",
        with_mean(
            node("ConstantOfShape", "s", output="b"),
            node("Cast", "b", output="c", to=TensorProto.DOUBLE),
            node("Reshape", "c", "t", output="d"),
            node("CastLike", "d", "x", output="mean"),
            constants={"s": np.array([2**28]), "t": np.array([2**14, 2**14])},
        ),
    )
    for size in (2**24, 2**40):
        for what, model in long_vectors(size):
            yield f"{what} of {size}", model
    yield (
        "many axes",
        with_mean(
            node("Unsqueeze", "one", "axes", output="mean"),
            constants={"one": np.ones(3, np.float32), "axes": np.arange(1, 1000)},
        ),
    )
    for kind in (0, 8, 16, 17, 22, 99):
        yield (
            f"type {kind}",
            with_initializer(TensorProto(name="mean", dims=[3], raw_data=bytes(12), data_type=kind)),
        )
    yield "nested", nested(nodes // 10)
    yield "nested bytes", nested_bytes(nodes // 10)
    yield "nested as deep as protobuf reads", nested(20)
    yield (
        "chain of constants",
        with_mean(*chain("Identity", "w", "mean", nodes // 5), constants={"w": VALUES["mean"]}),
    )
    yield "chain", make([*chain("Relu", "x", "h", nodes), batch_norm("h")], VALUES)
    yield (
        "layers",
        make(
            [batch_norm(f"h{k - 1}" if k else "x", f"h{k}", training_mode=k % 2) for k in range(nodes // 50)],
            VALUES,
        ),
    )
    yield "pairs", pairs(nodes // 20)
    yield "long name", make([batch_norm(name="n" * 2**24)], VALUES)


def external(folder, secret):
    """Yield name and file of models whose data are in a file that must not be read, or is no file.

    Args:
        folder: Folder for the models.
        secret: A file outside it.
    """
    (folder / "link").symlink_to(secret)
    (folder / "folder").mkdir()
    (folder / "parent").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "weights").write_bytes(bytes(12))
    locations = {
        "parent folder": {"location": f"../{secret.name}"},
        "parent folder within": {"location": f"folder/../../{secret.name}"},
        "absolute": {"location": str(secret)},
        "absolute with two strokes": {"location": f"/{secret}"},
        "link": {"location": "link"},
        "link to a folder": {"location": f"parent/{secret.name}"},
        "null byte": {"location": f"weights\0/../../{secret.name}"},
        "folder": {"location": "folder"},
        "itself": {"location": "."},
        "nothing": {"location": ""},
        "no location": {},
        "loop": {"location": "loop"},
        "pipe": {"location": "pipe"},
        "device": {"location": "/dev/zero", "length": "12"},
        "missing": {"location": "none"},
        "long": {"location": "n" * 5000},
        "offset": {"location": "weights", "offset": "13"},
        "offset of many digits": {"location": "weights", "offset": "9" * 5000},
        "negative offset": {"location": "weights", "offset": "-1"},
        "length": {"location": "weights", "length": str(2**60)},
        "negative length": {"location": "weights", "length": "-1"},
        "no number": {"location": "weights", "length": "x"},
    }
    for name, entries in locations.items():
        for kind in ("initializer", "Constant"):
            tensor = TensorProto(name="mean", data_type=1, dims=[3], data_location=TensorProto.EXTERNAL)
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
            model = with_mean(node("Constant", output="mean", value=tensor)) if kind == "Constant" else (
                with_initializer(tensor)
            )  # fmt: skip
            path = Path(folder / f"{name} {kind}.onnx")
            path.write_bytes(model.SerializeToString())
            yield f"{name} {kind}", path
