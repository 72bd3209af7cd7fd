"""`batchnorm import` of what torch.save writes: loaded as weights only, with the layers that PyTorch has."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import batchnorm as bn
import batchnorm.torch as bt
from batchnorm.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)))
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    return made


def run(*arguments):
    return CliRunner().invoke(main, ["import", *arguments])


def imported(path):
    done = run(path, "-o", "made")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return {
        file.name.removesuffix(".safetensors"): bn.FrozenBatchNorm.load(file)
        for file in Path("made").iterdir()
    }


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_they_are_the_layers_that_freeze_returns(model, suffix):
    path = f"network.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    assert imported(path) == bt.freeze(model)


def test_a_checkpoint_with_more_in_it(model):
    optimizer = torch.optim.Adam(model.parameters())
    checkpoint = {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, "checkpoint.pt")
    assert imported("checkpoint.pt") == {f"model.{name}": layer for name, layer in bt.freeze(model).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(model, dtype):
    torch.save(model.to(dtype).state_dict(), "network.pt")
    found = imported("network.pt")
    assert found == bt.freeze(model)
    assert found["1"].dtype == (np.float64 if dtype == torch.float64 else np.float32)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_no_code_in_a_file_is_run(model):
    torch.save({"state": model.state_dict(), "harm": Malicious()}, "network.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save(model, "whole.pt")
    Path("damaged.pt").write_bytes(b"PK\3\4 no archive")
    for path in ("network.pt", "plain.pt", "whole.pt", "damaged.pt"):
        done = run(path, "-o", "made")
        assert done.exit_code == 2
        assert re.fullmatch(rf"batchnorm: {path}: torch\.load with weights_only=True [^\n]+\n", done.stderr)
    assert not Path("harm").exists()
    assert not Path("made").exists()
