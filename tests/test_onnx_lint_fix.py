"""`batchnorm.onnx.fix`, and the command `batchnorm lint`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.onnx import fix, frozen_layers, lint
from batchnorm.onnx.findings import SEVERITIES
from onnx_models import GOLDEN, batch_norm, make, parameters, real_graph, run

EXAMPLE = shlex.split(main.commands["lint"].epilog.removeprefix("Example: "))
TRAINING = next(path for path in GOLDEN if path.stem.startswith("training_mode"))
STATISTICS = ("m", "v")


def model_of(rng, *, opset=15, ir=8, outputs=("y", *STATISTICS), **attributes):
    node = batch_norm(name="bn", **attributes)
    node.output[:] = outputs
    return make([node], parameters(rng), y=("n", 3), opset=opset, ir=ir)


def normalized(model, x):
    """What the parameters of the one node of `model` make of x in inference mode, in float64."""
    values = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    scale = values["gamma"] / np.sqrt(values["var"] + 1e-5)
    return (x - values["mean"]) * scale + values["beta"]


FORMS = {
    "14": {"opset": 14, "training_mode": 1},
    "15": {"training_mode": 1, "momentum": 0.8},
    "26": {"opset": 26, "ir": 13, "training_mode": 1},
    "9": {"opset": 9, "outputs": ("y", *STATISTICS, "saved_m", "saved_v")},
    "7": {"opset": 7, "outputs": ("y", *STATISTICS, "saved_m", "saved_v")},
    "9, IR 3": {"opset": 9, "ir": 3, "outputs": ("y", *STATISTICS, "saved_m", "saved_v")},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_repaired_model_is_the_inference_form(rng, name):
    """In training mode it computes something else; afterwards, what its running statistics say."""
    model = model_of(rng, **FORMS[name])
    x = (3 + rng.normal(size=(50, 3))).astype(np.float32)
    expected = normalized(model, x.astype(np.float64))
    assert np.abs(run(model, {"x": x})[0] - expected).max() > 0.1
    before = model.SerializeToString()
    repaired, fixed = fix(model)
    assert model.SerializeToString() == before
    assert [finding.name for finding in fixed] == ["training-mode"]
    assert lint(repaired) == []
    onnx.checker.check_model(repaired, full_check=True)
    y = run(repaired, {"x": x})[0]
    assert np.abs(y - expected).max() < 1e-5
    (layer,) = frozen_layers(repaired).values()
    assert np.abs(layer(x) - y).max() < 1e-5
    # Nothing but the mode and the outputs differ.
    node = model.graph.node[0]
    del node.output[1:]
    kept = [attribute for attribute in node.attribute if attribute.name != "training_mode"]
    del node.attribute[:]
    node.attribute.extend(kept)
    assert repaired == model


def test_opset_6(rng):
    """No runtime that we test has it but OpenVINO, which ignores the mode."""
    model = model_of(rng, opset=6, outputs=("y", "m", "v", "saved_m", "saved_v"), is_test=0, epsilon=1e-3)
    repaired, fixed = fix(model)
    assert [finding.name for finding in fixed] == ["training-mode"]
    assert [finding.name for finding in lint(repaired)] == ["runtime"]
    (layer,) = frozen_layers(repaired).values()
    assert layer.eps == np.float32(1e-3)
    onnx.checker.check_model(repaired)


def test_a_single_output(rng):
    """ONNX Runtime refuses such a node in training mode."""
    model = model_of(rng, outputs=("y",), training_mode=1)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    assert np.abs(run(fix(model)[0], {"x": x})[0] - normalized(model, x)).max() < 1e-5


def test_the_types_of_removed_outputs_go_too(rng):
    model = model_of(rng, training_mode=1)
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in (*STATISTICS, "other")
    )
    assert [entry.name for entry in fix(model)[0].graph.value_info] == ["other"]


def test_statistics_that_are_used_are_left(rng):
    read = model_of(rng, training_mode=1)
    read.graph.node.append(helper.make_node("Neg", ["v"], ["negated"], name="after"))
    output = model_of(rng, training_mode=1)
    output.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [3]))
    inner = helper.make_graph(
        [helper.make_node("Neg", ["m"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    below = model_of(rng, training_mode=1)
    below.graph.node.append(
        helper.make_node("If", ["c"], ["z"], name="choice", then_branch=inner, else_branch=inner)
    )
    reasons = {
        "its output 'v' is read by Neg 'after'": read,
        "its output 'm' is an output of the model": output,
        "its output 'm' is read by If 'choice'": below,
    }
    for reason, model in reasons.items():
        (finding,) = lint(model)
        assert finding.message == f"is in training mode (training_mode=1), and --fix leaves it so: {reason}"
        assert fix(model) == (model, [])


def test_nodes_are_repaired_one_by_one(rng):
    """Of two, the one whose statistics are used stays."""
    first, second = (
        batch_norm(y="h", name="first", training_mode=1),
        batch_norm("h", name="second", training_mode=1),
    )
    first.output.append("m")
    second.output.append("n")
    model = make([first, second], parameters(rng))
    model.graph.output.append(helper.make_tensor_value_info("n", TensorProto.FLOAT, [3]))
    repaired, fixed = fix(model)
    assert [finding.node for finding in fixed] == ["first"]
    left = [finding.node for finding in lint(repaired) if finding.name == "training-mode"]
    assert left == ["second"]


def test_a_damaged_attribute_does_not_hinder(rng):
    damaged = batch_norm(y="h", name="damaged")
    damaged.attribute.append(onnx.AttributeProto(name="training_mode", ref_attr_name="e", type="INT"))
    model = make([damaged, batch_norm("h", name="bn", training_mode=1)], parameters(rng))
    repaired, fixed = fix(model)
    assert [finding.node for finding in fixed] == ["bn"]
    assert "damaged" in [finding.name for finding in lint(repaired)]


def test_a_sound_model_stays_as_it_is(tmp_path):
    for path in GOLDEN:
        model = onnx.load(path)
        repaired, fixed = fix(path)
        assert (repaired == model) == (not fixed) == (path != TRAINING)
    assert len(GOLDEN) == 25
    out = tmp_path / "out.onnx"
    assert fix(GOLDEN[0], out=out)[0] == onnx.load(out) == onnx.load(GOLDEN[0])


def test_a_model_of_pytorch(rng):
    """Its running statistics are those that PyTorch had when it was exported."""
    repaired, _ = fix(TRAINING)
    x = np.load(TRAINING.with_suffix(".npz"))["x"]
    (layer,) = frozen_layers(repaired).values()
    conv = onnx.ModelProto()
    conv.CopyFrom(repaired)
    conv.graph.output.append(
        helper.make_tensor_value_info(repaired.graph.node[-1].input[0], TensorProto.FLOAT, None)
    )
    y, tap = run(conv, {repaired.graph.input[0].name: x}, optimize=False)
    assert np.abs(layer(tap) - y).max() < 1e-5


def test_a_real_graph_in_training_mode(rng):
    """All 53 layers come back."""
    sound = real_graph("resnet50")
    model = onnx.ModelProto()
    model.CopyFrom(sound)
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    for index, node in enumerate(nodes):
        node.output.extend([f"running_mean_{index}", f"running_var_{index}"])
    assert sum(finding.name == "training-mode" for finding in lint(model)) == 53
    repaired, fixed = fix(model)
    assert len(fixed) == 53
    assert repaired == sound


# The command


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(bn.FrozenBatchNorm([0.5, 1], [1, 2]).to_onnx(rank=2), "sound.onnx")
    onnx.save(bn.FrozenBatchNorm([0.5, 1], [1, 0]).to_onnx(rank=2), "model.onnx")


def command(*arguments, status):
    result = CliRunner().invoke(main, ["lint", *map(str, arguments)])
    assert result.exit_code == status, result.output
    if status == 2:
        assert result.stderr.startswith("batchnorm: ")
        assert result.stderr.count("\n") == 1
        return result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["sound.onnx"], 0),
        (["model.onnx"], 1),
        (["model.onnx", "--fail-on", "warning"], 1),
        (["model.onnx", "--fail-on", "info"], 1),
        (["model.onnx", "--fail-on", "error"], 0),
        (["model.onnx", "--ignore", "zero-variance"], 0),
        (["model.onnx", "--ignore", "zero-variance", "--ignore", "momentum"], 0),
        (["model.onnx", "--ignore", "eps"], 1),
        (EXAMPLE[2:], 0),
    ],
)
def test_exit_status(arguments, status):
    assert EXAMPLE[:2] == ["batchnorm", "lint"]
    (fail_on,) = (option for option in main.commands["lint"].params if option.name == "fail_on")
    assert tuple(fail_on.type.choices) == SEVERITIES
    command(*arguments, status=status)
    command(*arguments, "--json", status=status)


def test_table():
    printed = command("model.onnx", status=1)
    assert "zero-variance: `batchnorm recalibrate` on data in which" in printed
    assert printed.splitlines()[-1] == "model.onnx: 0 errors, 1 warning, 0 info"
    assert command("sound.onnx", status=0) == "sound.onnx: 0 errors, 0 warnings, 0 info\n"


def test_names_are_shown_as_they_are():
    """They may look like markup of the table."""
    model = onnx.load("model.onnx")
    model.graph.node[0].name = "[bold]/a[/bold]"
    onnx.save(model, "markup.onnx")
    assert "[bold]/a[/bold]" in command("markup.onnx", status=1)


def test_json():
    shown = json.loads(command("model.onnx", "--json", status=1))
    (finding,) = shown.pop("findings")
    assert finding.pop("remedy").startswith("`batchnorm recalibrate` on data")
    assert finding == {
        "name": "zero-variance",
        "severity": "warning",
        "node": "batchnorm",
        "message": "var is 0 in channel 1",
    }
    assert shown == {
        "path": "model.onnx",
        "output": None,
        "counts": {"info": 0, "warning": 1, "error": 0},
        "fixed": [],
    }


def test_fix():
    command(TRAINING, status=1)
    printed = command(TRAINING, "--fix", "-o", "repaired.onnx", status=0)
    first, *_, last = printed.splitlines()
    assert first == "repaired.onnx: /1/BatchNormalization is in training mode (training_mode=1): fixed"
    assert last == "repaired.onnx: 0 errors, 0 warnings, 1 info"
    shown = json.loads(command(TRAINING, "--fix", "-o", "again.onnx", "--json", status=0))
    assert [finding["name"] for finding in shown["fixed"]] == ["training-mode"]
    assert [finding["name"] for finding in shown["findings"]] == ["unfolded"]
    assert (shown["path"], shown["output"]) == (str(TRAINING), "again.onnx")
    assert Path("again.onnx").read_bytes() == Path("repaired.onnx").read_bytes()
    command("model.onnx", "--fix", "-o", "model.onnx", status=1)  # what is left counts


def test_errors():
    assert "--fix and -o" in command("model.onnx", "--fix", status=2)
    assert "--fix and -o" in command("model.onnx", "-o", "out.onnx", status=2)
    assert "there is no finding 'nothing', only training-mode" in command(
        "model.onnx", "--ignore", "nothing", status=2
    )
    assert "ends in .onnx" in command("model.onnx", "--fix", "-o", "out.txt", status=2)
    assert "does not exist" in command("none.onnx", status=2)
    Path("none.onnx").write_bytes(b"nothing")
    assert "none.onnx: not an ONNX model" in command("none.onnx", status=2)
    assert sorted(path.name for path in Path().iterdir()) == ["model.onnx", "none.onnx", "sound.onnx"]
