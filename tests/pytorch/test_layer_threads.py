"""Our layers on PyTorch's threads: the same bits for any number, in several Python threads, after a fork."""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch
from layer_cases import pair, tensors
from torch import nn

from batchnorm.torch._host import HOST

# Large enough that every pass is shared among threads.
LARGE = (8, 64, 28, 28)


def step(layer, inputs, dy):
    """y, gradients and running statistics of a step, starting from the state of the layer."""
    layer = copy.deepcopy(layer)
    y = layer(*inputs)
    gradients = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], dy)
    return [y, *gradients, layer.running_mean, layer.running_var]


def test_the_threads_are_those_of_pytorch():
    """PyTorch's wheels for Linux bring GNU's OpenMP runtime, which the process then has."""
    if not torch.backends.openmp.is_available():
        pytest.skip("this PyTorch was built without OpenMP")
    assert HOST.thread_source == "openmp"


@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(training, order, dtype):
    layer, _ = pair(nn.BatchNorm2d, LARGE[1], activation="relu", training=training)
    *inputs, dy = tensors(LARGE, 3, dtype=dtype, order=order)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(layer, inputs, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_several_python_threads():
    """Each with its own layer; all call at once, and autograd runs their backward passes at once."""
    layer, _ = pair(nn.BatchNorm2d, LARGE[1], activation="relu")
    *inputs, dy = tensors(LARGE, 3)
    wanted = step(layer, inputs, dy)
    results: list = [None] * 4
    barrier = threading.Barrier(len(results))

    def work(i):
        mine = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        barrier.wait()
        for _ in range(5):
            results[i] = step(layer, mine, dy)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    for result in results:
        for one, two in zip(result, wanted, strict=True):
            assert torch.equal(one, two)


def _in_the_child(layer, inputs, dy, wanted):
    """Compares by NumPy, since PyTorch's own large operators hang in a forked child."""
    for one, two in zip(step(layer, inputs, dy), wanted, strict=True):
        assert one.detach().numpy().tobytes() == two.detach().numpy().tobytes()


def forked():
    """Trains in this process and in a forked child; returns whether both gave the same bits."""
    layer, _ = pair(nn.BatchNorm2d, LARGE[1])
    x, dy = tensors(LARGE, 2)
    wanted = step(layer, [x], dy)
    child = multiprocessing.get_context("fork").Process(target=_in_the_child, args=(layer, [x], dy, wanted))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode == 0


def test_a_forked_child():
    """The child has no OpenMP team; PyTorch's own large operators hang there, our layers work.

    In a process of its own: once autograd has threads, PyTorch refuses to go backward in a child.
    """
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


if __name__ == "__main__":
    print(forked())
