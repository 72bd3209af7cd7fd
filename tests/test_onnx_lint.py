"""`batchnorm.onnx.lint`: each finding is provoked, and a near miss of it is not reported."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.onnx import fold, lint
from batchnorm.onnx.findings import RULES, SEVERITIES
from onnx_models import GOLDEN, LIGHT, NORMALIZATIONS, batch_norm, make, parameters, real_graph, run

RNG = np.random.default_rng(12)
EPS = float(np.float32(1e-5))


def layer(*, node=None, dtype="float32", opset=15, ir=8, extra=None, **changes):
    """A model of one batch normalization of three channels, whose parameters are changed by role."""
    values = parameters(RNG, dtype=dtype)
    for role, value in changes.items():
        values[role] = np.asarray(value, values[role].dtype)
    return make([node or batch_norm()], values | (extra or {}), dtype=dtype, opset=opset, ir=ir)


def names(model):
    return [finding.name for finding in lint(model)]


def only(model, name):
    """The one finding of a model."""
    (finding,) = lint(model)
    assert finding.name == name
    return finding


def test_a_sound_layer_has_no_finding():
    for dtype in ("float16", "float32", "float64"):
        assert lint(layer(dtype=dtype)) == []
    assert lint(make([helper.make_node("Relu", ["x"], ["y"])], {})) == []


# The numbers of a layer: what is reported, and what is just short of it

BELOW = np.float32(EPS) * np.float32(1.001)
VALUES = [
    # changes, name, severity, message, near misses
    (
        {"mean": [1, np.nan, 0]},
        "non-finite",
        "error",
        "mean is not finite in channel 1",
        [{"mean": [1, 3, 0]}],
    ),
    ({"gamma": [1, 1, np.inf]}, "non-finite", "error", "gamma is not finite in channel 2", []),
    ({"beta": [-np.inf, 1, 1]}, "non-finite", "error", "beta is not finite in channel 0", []),
    (
        {"var": [1, np.inf, 1]},
        "non-finite",
        "error",
        "var is not finite in channel 1",
        [{"var": [1, 3e38, 1]}],
    ),
    (
        {"var": [1, -1e-6, 2]},
        "negative-variance",
        "error",
        "var is -1e-06 in channel 1",
        [{"var": [1, 2, 2]}],
    ),
    ({"var": [1, 0, 2]}, "zero-variance", "warning", "var is 0 in channel 1", [{"var": [1, 2e-5, 2]}]),
    ({"var": [1, -0.0, 2]}, "zero-variance", "warning", "var is 0 in channel 1", []),
    (
        {"var": [1, EPS, 2], "mean": [0, 0, 0]},
        "tiny-variance",
        "info",
        "var is 1e-05 in channel 1, and epsilon 1e-05",
        [{"var": [1, BELOW, 2], "mean": [0, 0, 0]}],
    ),
    (
        {"mean": [0, 1001, -1e5], "var": [1, 1, 1]},
        "cancellation",
        "warning",
        "|mean|/√(var + ε) is up to 1e+05 in channels 1, 2: float32 loses 5.0 of 7.2 digits",
        [{"mean": [0, 999, -999], "var": [1, 1, 1]}, {"mean": [0, 1001, 0], "var": [1, 1.1, 1]}],
    ),
    (
        {"mean": 3 * [0], "var": 3 * [1]},
        "initial-statistics",
        "warning",
        "all means are 0 and all variances 1",
        [{"mean": 3 * [0], "var": [1, 1, 1.01]}, {"mean": [0, 0, 0.01], "var": 3 * [1]}],
    ),
    (
        {"gamma": [2, 0, -1e-6]},
        "dead-channels",
        "info",
        "gamma is 0 or negligible in channels 1, 2",
        [{"gamma": [2, -1e-5, 3e-6]}, {"gamma": 3 * [1e-20]}],
    ),
    ({"gamma": 3 * [0]}, "dead-channels", "warning", "gamma is 0 or negligible in channels 0, 1, 2", []),
]


@pytest.mark.parametrize(("changes", "name", "severity", "message", "misses"), VALUES)
def test_values(changes, name, severity, message, misses):
    finding = only(layer(**changes), name)
    assert (finding.severity, finding.node, finding.message) == (severity, "y", message)
    for miss in misses:
        assert lint(layer(**miss)) == []


def test_subnormal_variances():
    """With ε = 0, which is a finding of its own."""
    zero = batch_norm(epsilon=0.0)
    assert names(layer(node=zero, var=[1, 1e-39, 1], mean=3 * [0])) == ["eps", "tiny-variance"]
    assert names(layer(node=zero, var=[1, 1.2e-38, 1], mean=3 * [0])) == ["eps"]
    half = {"dtype": "float16", "mean": 3 * [0]}
    assert names(layer(node=zero, var=[1, 6e-5, 1], **half)) == ["eps", "tiny-variance"]
    assert names(layer(node=zero, var=[1, 6.2e-5, 1], **half)) == ["eps"]


@pytest.mark.parametrize(
    ("eps", "severity"), [(0.0, "warning"), (-1e-5, "error"), (np.inf, "error"), (np.nan, "error")]
)
def test_eps(eps, severity):
    finding = only(layer(node=batch_norm(epsilon=eps)), "eps")
    assert finding.severity == severity
    assert lint(layer(node=batch_norm(epsilon=1e-30))) == []


def test_zero_variance_is_an_error_where_eps_is_zero():
    found = {
        finding.name: finding.severity for finding in lint(layer(node=batch_norm(epsilon=0.0), var=[0, 1, 1]))
    }
    assert found == {"eps": "warning", "zero-variance": "error"}


def test_large_eps():
    node = batch_norm(epsilon=1.0)
    found = lint(layer(node=node, var=[0.5, 2, 0.9], mean=3 * [0]))
    assert [finding.name for finding in found] == ["tiny-variance", "large-eps"]
    assert found[1].message == "epsilon 1.0 is larger than the variance of 2 of 3 channels"
    assert names(layer(node=node, var=[0.5, 2, 1], mean=3 * [0])) == ["tiny-variance"]


@pytest.mark.parametrize(
    ("dtype", "ratio"), [("float16", 10), ("bfloat16", 10), ("float32", 1e3), ("float64", 1e12)]
)
def test_cancellation_by_type(dtype, ratio):
    def of(mean):
        values = {"mean": 3 * [mean], "var": 3 * [1]}
        model = layer(dtype=dtype, **values)
        return [finding for finding in lint(model) if finding.name != "runtime"]  # for bfloat16

    (finding,) = of(1.1 * ratio)
    assert finding.name == "cancellation"
    assert f": {dtype} loses " in finding.message
    assert of(0.9 * ratio) == []


def test_what_cancellation_costs_in_onnx_runtime(rng):
    """The error is of the size that the finding states: the ratio in units of the rounding error."""
    for ratio in (1e4, 1e5):
        var = rng.uniform(0.5, 2, 3).astype(np.float32)
        mean = (ratio * np.sqrt(var)).astype(np.float32)
        model = layer(mean=mean, var=var, gamma=3 * [1], beta=3 * [0])
        (finding,) = lint(model)
        lost = float(finding.message.split("loses ")[1].split(" of")[0])
        assert lost == pytest.approx(np.log10(ratio), abs=0.05)
        x = (mean + rng.normal(size=(1000, 3))).astype(np.float32)
        exact = (x.astype(np.float64) - mean) / np.sqrt(var.astype(np.float64) + EPS)
        error = np.abs(run(model, {"x": x})[0] - exact).max()
        assert 0.1 < error / (10**lost * 2.0**-24) < 10


# Training mode, momentum


def training(outputs=("y", "m", "v"), momentum=0.9):
    node = batch_norm(training_mode=1, momentum=momentum)
    node.output[:] = outputs
    return node


def test_training_mode():
    finding = only(layer(node=training()), "training-mode")
    assert (finding.severity, finding.message) == ("error", "is in training mode (training_mode=1)")
    assert names(layer(node=training(["y"]))) == ["training-mode"]
    assert names(layer(node=batch_norm(training_mode=0))) == []
    old = batch_norm()
    old.output.extend(["m", "", "v"])
    assert only(layer(node=old, opset=9), "training-mode").message == "is in training mode (3 outputs)"
    old.output[1:] = ["", ""]
    assert names(layer(node=old, opset=9)) == []
    assert names(layer(node=batch_norm(is_test=0), opset=6)) == ["runtime", "training-mode"]
    assert names(layer(node=batch_norm(is_test=1), opset=6)) == ["runtime"]


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.49, 1.5, -0.1])
def test_momentum(momentum):
    finding = only(layer(node=batch_norm(momentum=momentum)), "momentum")
    assert finding.severity == "info"
    assert str(momentum) in finding.message
    assert "not used" in finding.message
    used = lint(layer(node=training(momentum=momentum)))
    assert [(f.name, f.severity) for f in used] == [("training-mode", "error"), ("momentum", "warning")]
    for sound in (0.5, 0.9, 0.99, 1.0):
        assert names(layer(node=batch_norm(momentum=sound))) == []


# Damage, and what cannot be checked


def changed(**entries):
    node = batch_norm()
    for name, value in entries.items():
        node.input[("x", "gamma", "beta", "mean", "var").index(name)] = value
    return node


def four_inputs():
    node = batch_norm()
    del node.input[-1]
    return node


def without_value():
    node = batch_norm()
    node.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="e", type="FLOAT"))
    return node


def of_external_data():
    model = layer()
    tensor = model.graph.initializer[2]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    return model


DAMAGED = {
    "its input 'nothing' is no initializer": layer(node=changed(mean="nothing")),
    "its input '' is no initializer": layer(node=changed(gamma="")),
    "has 4 inputs, wanted 5": layer(node=four_inputs()),
    "an attribute is damaged": layer(node=without_value()),
    "epsilon is 1, wanted one float": layer(node=batch_norm(epsilon=1)),
    "momentum is 1, wanted one float": layer(node=batch_norm(momentum=1)),
    r"wanted, found gamma \(3,\), beta \(3,\), mean \(2,\), var \(3,\)": layer(mean=[1, 2]),
    r"wanted, found gamma \(1, 3\)": layer(
        **{r: np.full((1, 3), 2) for r in ("gamma", "beta", "mean", "var")}
    ),
    r"x has 3 channels, but the parameters have shape \(2,\)": make([batch_norm()], parameters(RNG, 2)),
    "x has 1 axes, wanted 2 or more": make([batch_norm()], parameters(RNG), x=(3,)),
    "of floats is wanted, found int64": layer(
        node=changed(mean="whole"), extra={"whole": np.array([1, 2, 3])}
    ),
    "which was not loaded": of_external_data(),
}


@pytest.mark.parametrize("match", DAMAGED)
def test_damage(match):
    found = [finding for finding in lint(DAMAGED[match]) if finding.name == "damaged"]
    assert len(found) == 1
    assert found[0].severity == "error"
    assert re.search(match, found[0].message), found[0].message


def test_a_damaged_parameter_does_not_hide_the_others():
    model = layer(var=[1, -1, 1])
    model.graph.initializer[0].raw_data = b"\0"
    assert names(model) == ["damaged", "negative-variance"]


def test_computed_parameters_are_not_checked():
    negated = helper.make_node("Neg", ["mean"], ["negated"])
    model = make([negated, changed(mean="negated")], parameters(RNG) | {"var": -np.ones(3, np.float32)})
    unchecked, negative = lint(model)
    assert (unchecked.name, unchecked.severity, negative.name) == ("unchecked", "info", "negative-variance")
    assert "mean ('negated') is computed by Neg" in unchecked.message
    negated.op_type = "Identity"
    assert names(make([negated, changed(mean="negated")], parameters(RNG))) == []
    model = layer()
    model.graph.input.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, [3]))
    del model.graph.initializer[2]
    assert "mean ('mean') is an input" in only(model, "unchecked").message


def test_other_forms_are_not_checked():
    assert names(layer(node=batch_norm(spatial=0), opset=7, var=[-1, 1, 1])) == ["unchecked"]
    assert names(layer(node=batch_norm(spatial=1), opset=7)) == []
    assert names(layer(node=batch_norm(is_test=1), opset=1)) == ["runtime", "unchecked"]


def in_a_branch(**attributes):
    inner = helper.make_graph(
        [batch_norm(y="inner", name="hidden", **attributes)],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=inner, else_branch=inner)
    return make([node], parameters(RNG) | {"c": np.array(True)})


def test_nodes_in_subgraphs():
    found = lint(in_a_branch())
    assert [(f.name, f.node, f.message) for f in found] == [
        ("unchecked", "hidden", f"is in {branch} of If 'choice', not in the main graph")
        for branch in ("else_branch", "then_branch")
    ]
    found = lint(in_a_branch(training_mode=1))
    assert [f.name for f in found] == 2 * ["training-mode", "unchecked"]
    assert "--fix leaves it so: it is in else_branch of If 'choice'" in found[0].message


def test_nodes_in_functions():
    """An attribute may be one that the caller gives, so that the mode is not known."""
    node = batch_norm(name="hidden")
    node.attribute.append(onnx.AttributeProto(name="training_mode", ref_attr_name="mode", type=2))
    model = make([helper.make_node("F", ["x"], ["y"], domain="d", mode=1)], parameters(RNG))
    opset = helper.make_opsetid("", 15)
    model.functions.append(helper.make_function("d", "F", node.input, ["y"], [node], [opset], ["mode"]))
    finding = only(model, "unchecked")
    assert (finding.node, finding.message) == ("hidden", "is in the function F, not in the main graph")


# Nodes together


def two(first, second):
    return make(
        [batch_norm(y="h", prefix=first, name="one"), helper.make_node("Relu", ["h"], ["r"]),
         batch_norm("r", prefix=second, name="two")],
        parameters(RNG, prefix="a.") | parameters(RNG, prefix="b."),
    )  # fmt: skip


def test_shared_statistics():
    found = lint(two("a.", "a."))
    assert [(f.name, f.node, f.message) for f in found] == [
        ("shared-statistics", "two", "has its mean 'a.mean' from 'one'"),
        ("shared-statistics", "two", "has its var 'a.var' from 'one'"),
    ]
    assert lint(two("a.", "b.")) == []
    model = two("a.", "b.")
    model.graph.node[2].input[1] = "a.gamma"
    assert lint(model) == []


@pytest.mark.parametrize("role", ["gamma", "mean"])
def test_overridable(role):
    model = layer()
    model.graph.input.append(helper.make_tensor_value_info(role, TensorProto.FLOAT, [3]))
    finding = only(model, "overridable")
    assert (finding.severity, finding.message) == ("warning", f"a caller can replace {role!r}")
    model.ir_version = 3
    assert lint(model) == []


# Whole models


def counts(model):
    return Counter((finding.severity, finding.name) for finding in lint(model))


def test_models_of_pytorch():
    """Sound models have nothing to report but what could be folded."""
    found = {path.stem: counts(path) for path in GOLDEN}
    assert len(found) == 25
    assert found.pop("training_mode.script.opset17") == {("error", "training-mode"): 1}
    unfolded = {name for name, count in found.items() if count == {("info", "unfolded"): 1}}
    assert unfolded == {name for name in found if name.startswith(("depthwise", "mlp"))}
    assert len(unfolded) == 8
    assert all(not count for name, count in found.items() if name not in unfolded)


@pytest.mark.parametrize(
    "model", [*GOLDEN, *(LIGHT / f"light_{n}.onnx" for n in ("shufflenet", "densenet121"))]
)
def test_what_can_be_folded_is_what_fold_folds(model):
    """But for pairs of Mul and Add, into which `fold` does not fold."""
    unfolded = {
        f.node for f in lint(model) if f.name == "unfolded" and not re.search("into (Mul|Add)", f.message)
    }
    _, report = fold(model, verify=False)
    assert {node.name for node in report.nodes if node.into} == unfolded


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_real_graphs(name):
    """As shipped some layers have the trained parameters; others behind ConstantOfShape are all equal."""
    tiny = {"densenet121": 2, "shufflenet": 1}.get(name, 0)
    expected = Counter({("info", "unfolded"): NORMALIZATIONS[name], ("info", "tiny-variance"): tiny})
    assert counts(real_graph(name)) == expected
    assert counts(LIGHT / f"light_{name}.onnx") == expected
    assert sum(expected.values()) == NORMALIZATIONS[name] + tiny


def test_a_real_graph_with_one_bad_channel():
    model = real_graph("resnet50")
    tensor = next(t for t in model.graph.initializer if t.name == model.graph.node[1].input[4])
    values = numpy_helper.to_array(tensor).copy()
    values[7] = -1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (finding,) = (f for f in lint(model) if f.name != "unfolded")
    assert (finding.name, finding.message) == ("negative-variance", "var is -1 in channel 7")


def test_sources(tmp_path):
    model = layer(var=[1, -1, 1])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert lint(model) == lint(path) == lint(str(path)) == lint(path.read_bytes()) != []
    with pytest.raises(ValueError, match="not an ONNX model"):
        lint(b"nothing")
    with pytest.raises(FileNotFoundError):
        lint(tmp_path / "none.onnx")


def test_the_model_is_not_changed():
    model = layer(node=training(), var=[1, -1, 1])
    before = model.SerializeToString()
    assert lint(model)
    assert model.SerializeToString() == before


# The table of findings


def test_the_page_has_the_findings():
    page = (Path(__file__).parent.parent / "docs" / "lint.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    table = [[f"`{name}`", *rule] for name, rule in RULES.items()]
    assert len(table) == 17
    assert [row[:1] + [cell.replace("\\|", "|") for cell in row[1:]] for row in rows] == table


def test_every_finding_is_tested_and_has_one_of_its_severities():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_onnx_lint*.py"))
    assert [name for name in RULES if f'"{name}"' not in text] == []
    for rule in RULES.values():
        assert set(rule.severity.split(" or ")) <= set(SEVERITIES)


def test_bfloat16_parameters_are_read():
    model = layer(dtype="bfloat16", var=np.array([1, -1, 1], ml_dtypes.bfloat16))
    assert sorted(names(model)) == ["negative-variance", "runtime"]
