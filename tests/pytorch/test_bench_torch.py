"""PyTorch as the benchmark's peer, in a process of its own; and that the layers it times are a network's."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from bench import rows
from bench.case import TOLERANCE, Case


@pytest.fixture(scope="module")
def peer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_TORCH", sys.executable)
        return importlib.import_module("bench.peers.torch")


@pytest.mark.parametrize("dtype", rows.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 6, 5, 5), 1), ((4, 5, 5, 6), -1), ((40, 6), 1)], ids=["NCHW", "NHWC", "NC"]
)
def test_the_process_gives_our_answer(peer, shape, axis, dtype):
    case = Case.of(rows.Row(shape, axis, dtype))
    case.answer_all()
    passes = peer.calls(case, 1)
    assert set(passes) == set(rows.DIRECTIONS)
    for direction, call in passes.items():
        assert case.difference(direction, call()) <= TOLERANCE[dtype], direction
        assert call.timed(3) > 0


def test_several_cases_run_one_after_the_other(peer):
    cases = [Case.of(rows.Row((4, channels, 3, 3))) for channels in (2, 5)]
    for case in cases:
        case.answer_all()
    for direction, call in peer.together(cases, 1).items():
        for case, answer in zip(cases, call.answers(), strict=True):
            assert case.difference(direction, answer) <= TOLERANCE["float32"], direction


def test_it_runs_pytorch_as_installed(peer):
    assert peer.version() == torch.__version__


def test_the_layers_that_are_timed_are_those_of_the_network():
    seen = []
    model = mobilenet_v2(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, inputs, y: seen.append(tuple(y.shape)))
    with torch.no_grad():
        model(torch.zeros(16, 3, 128, 128))
    assert len(seen) == 52
    assert [row.shape for row in rows.MOBILENET] == seen
