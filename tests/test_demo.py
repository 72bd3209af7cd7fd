"""The demonstration with fewer training steps, and the code that it suggests to try next."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from rich.text import Text

import batchnorm as bn
from batchnorm import demo
from batchnorm.demo import client

STEPS = 200


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        demo.main(output, steps=STEPS)
    return SimpleNamespace(output=output, said=Text.from_ansi(said.getvalue()).plain)


def test_each_stop_is_named_in_order(ran):
    stops = re.findall(r"^(\d)/(\d) (\w+)", ran.said, re.MULTILINE)
    assert [int(stop) for stop, _, _ in stops] == list(range(1, len(stops) + 1))
    assert {int(last) for _, last, _ in stops} == {len(stops)}
    assert [verb for _, _, verb in stops] == ["Load", "Train", "Estimate", "Export", "Start", "Draw", "Done"]


def test_both_accuracies_are_shown_by_step(ran):
    rows = re.findall(r"│ (\d+) +│ ([\d.]+)% +│ ([\d.]+)% +│", ran.said)
    assert int(rows[0][0]) == 10
    assert int(rows[-1][0]) == STEPS
    plain, normalized = (float(p) for p in rows[-1][1:])
    assert normalized > 90 > plain


def test_what_it_leaves_behind(ran):
    files = {str(path.relative_to(ran.output)) for path in ran.output.rglob("*") if path.is_file()}
    assert files == {
        "accuracy.png",
        "activations.npy",
        "models/hidden1.safetensors",
        "models/hidden2.safetensors",
        "models/hidden3.safetensors",
        "network.onnx",
        "report.md",
        "service.log",
    }
    assert (ran.output / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    layer = bn.FrozenBatchNorm.load(ran.output / "models/hidden1.safetensors")
    y = layer(np.load(ran.output / "activations.npy"))
    assert y.shape == (360, 100)
    np.testing.assert_allclose(y.mean(0), layer.beta, atol=0.5 * abs(layer.gamma).max())


def test_the_onnx_model_is_the_whole_network(ran):
    model = onnx.load(ran.output / "network.onnx")
    onnx.checker.check_model(model, full_check=True)
    operators = [node.op_type for node in model.graph.node]
    assert operators == ["MatMul", "BatchNormalization", "Sigmoid"] * 3 + ["Gemm"]


def test_the_report_tells_every_check(ran):
    report = (ran.output / "report.md").read_text("utf-8")
    checks = re.findall(r"^ +✓ (.*)$", ran.said, re.MULTILINE)
    assert len(checks) == 12
    assert re.findall(r"## What was checked\n\n((?:- .*\n)+)", report) == [
        "".join(f"- {c}\n" for c in checks)
    ]
    assert "(accuracy.png)" in report
    assert f"{STEPS} steps" in report
    for form in ("JSON", "binary"):
        assert sum(f"by HTTP, {form}" in c for c in checks) == 3


def test_the_service_is_gone_afterwards(ran):
    port = int(re.search(r"answers on port (\d+)", ran.said)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_check_that_fails_is_an_error(tmp_path, monkeypatch, capsys):
    """One wrong bit in one answer of the service."""

    def one_bit_off(port, model, x, infer=client.infer_binary):
        answer = infer(port, model, x)
        answer.y.view(np.uint32)[7, 7] ^= 1
        return answer

    monkeypatch.setattr(client, "infer_binary", one_bit_off)
    with pytest.raises(demo.CheckFailedError, match="hidden1 by HTTP, binary"):
        demo.main(tmp_path, steps=100)
    assert "Done" not in capsys.readouterr().out
    assert not (tmp_path / "report.md").exists()


def test_a_service_that_does_not_start_is_told_with_its_log(tmp_path):
    with (
        pytest.raises(RuntimeError, match=r"did not start(?s:.)*not point to a directory"),
        client.serving(tmp_path / "missing", tmp_path / "log"),
    ):
        pytest.fail("there is nothing to serve")


@pytest.mark.parametrize("steps", [0, -10, 15])
def test_numbers_of_steps_that_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=f"steps: was {steps}, wanted a multiple of 10"):
        demo.main(tmp_path, steps=steps)


def test_the_commands_that_it_prints_work(ran, tmp_path):
    fit, body = re.search(
        r"^  batchnorm (fit .*) && batchnorm serve \.\n  curl .* -d '(.*)'$", ran.said, re.M
    ).groups()
    rows = np.arange(12.0).reshape(4, 3)
    np.savetxt(tmp_path / "my.csv", rows, delimiter=",", header="a,b,c", comments="")
    command = [sys.executable, "-m", "batchnorm", *fit.split()]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    path = re.search(r"http://127\.0\.0\.1:8080(/\S+)", ran.said)[1]
    with client.serving(tmp_path, tmp_path / "log") as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        # What curl sends where it is told nothing else.
        connection.request("POST", path, body, {"Content-Type": "application/x-www-form-urlencoded"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
    assert response.status == 200
    x = np.array(json.loads(body)["inputs"][0]["data"], np.float32)
    layer = bn.FrozenBatchNorm.load(tmp_path / "bn.safetensors")
    assert np.array_equal(np.array(answer["outputs"][0]["data"], np.float32), layer(x[None])[0])


def test_the_lines_for_pytorch_work(ran, tmp_path, monkeypatch):
    """PyTorch is not needed for the line that is ours."""
    *_, freeze = re.search(
        r"^  import torch, (.*)\n  state = torch\.load.*\n  (.*)$", ran.said, re.M
    ).groups()
    names = ("running_mean", "running_var", "weight", "bias")
    state = {f"bn1.{name}": np.full(3, k + 1, np.float32) for k, name in enumerate(names)}
    monkeypatch.chdir(tmp_path)
    exec(freeze, {"bn": bn, "state": state})
    layer = bn.FrozenBatchNorm.load(Path("bn.safetensors"))
    assert [float(p[0]) for p in (layer.mean, layer.var, layer.gamma, layer.beta)] == [1, 2, 3, 4]
