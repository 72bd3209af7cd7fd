"""The demonstration: trains a network on real data, freezes, exports and serves it, and checks every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from batchnorm.demo import client, report
from batchnorm.demo.network import PIXELS, Array, Digits, FrozenNetwork, dense_network, load_digits
from batchnorm.demo.onnx_model import to_onnx
from batchnorm.demo.training import EVALUATE_EVERY, TARGET, Run, train
from batchnorm.frozen import FrozenBatchNorm

__all__ = ["CheckFailedError", "main"]

RATES: Final = (0.1, 1.0, 3.0, 10.0)
_STOPS: Final = 7

_NEXT: Final = """
Now with your own data, here a .csv of three columns (`batchnorm --help` tells more):

  batchnorm fit my.csv -o bn.safetensors && batchnorm serve .
  curl -s http://127.0.0.1:8080/v2/models/bn/infer -d \
'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 2.0, 3.0]}]}'

And a layer that PyTorch trained, its name in the model before the dot:

  import torch, batchnorm as bn
  state = torch.load("model.pt", weights_only=True)
  bn.FrozenBatchNorm.from_torch(state, prefix="bn1.").save("bn.safetensors")
"""


class CheckFailedError(RuntimeError):
    """A check of the demonstration failed."""


def main(output: Path, *, steps: int = 1000) -> None:
    """Train, freeze, save, export and serve a small network on real data, and check every step.

    Args:
        output: Folder for the plot, the models and the report; created if it does not exist.
        steps: Training steps of each network, a multiple of 10.

    Raises:
        CheckFailedError: A check failed; the text says which.
        RuntimeError: The service did not start, or answered a request with an error.
        ValueError: `steps` is not a positive multiple of 10.
    """
    if steps < EVALUATE_EVERY or steps % EVALUATE_EVERY:
        raise ValueError(f"steps: was {steps}, wanted a multiple of {EVALUATE_EVERY}")
    # Matrices this small gain nothing from a second thread, and waiting for one takes long on a busy machine.
    with threadpool_limits(1, user_api="blas"):
        _run(output, steps)


def _run(output: Path, steps: int) -> None:
    start = time.perf_counter()
    models = output / "models"
    models.mkdir(parents=True, exist_ok=True)
    guide = _Guide()

    guide.name("Load the handwritten digits that ship with scikit-learn")
    digits = load_digits()
    guide.say(f"{len(digits.x)} to train on, {len(digits.held_out_x)} held out")

    guide.name(f"Train three hidden layers with and without batch normalization, {len(RATES)} rates each")
    runs = _train(guide, digits, steps)
    rate = max(runs[False], key=lambda run: run.rank).rate
    plain, normalized = (next(r for r in runs[kind] if r.rate == rate) for kind in (False, True))
    _show(guide, runs, plain, normalized)

    guide.name("Estimate the population by Algorithm 2: forward passes, no steps; freeze and save the layers")
    network = normalized.network.freeze(digits.batches(np.random.default_rng(3), 100))
    right = network(digits.held_out_x).argmax(1) == digits.held_out_digit
    guide.say(f"the frozen network recognizes {right.mean():.1%} of the held-out digits")
    norms = {f"hidden{k}": norm for k, norm in enumerate(network.norms(digits.held_out_x), 1)}
    np.save(output / "activations.npy", norms["hidden1"][1])
    for name, (layer, activations) in norms.items():
        path = models / f"{name}.safetensors"
        layer.save(path)
        again = FrozenBatchNorm.load(path)
        same = again == layer and _same_bits(again(activations), layer(activations))
        guide.check(same, f"{path.name} loads as the layer that was saved, {layer.fingerprint[:12]}…")

    guide.name("Export the whole network to ONNX and run it in ONNX Runtime")
    _run_onnx(guide, network, digits.held_out_x, output / "network.onnx")

    guide.name("Start the service and send it the held-out activations over HTTP")
    with client.serving(models, output / "service.log") as port:
        guide.say(f"python -m batchnorm_service {models} answers on port {port}")
        for name, (layer, activations) in norms.items():
            y = layer(activations)
            for form, infer in (("JSON", client.infer_json), ("binary", client.infer_binary)):
                answer = infer(port, name, activations)
                same = answer.fingerprint == layer.fingerprint and _same_bits(answer.y, y)
                guide.check(same, f"{name} by HTTP, {form}: {y.size} values, each with the bits of Python's")

    guide.name(f"Draw and report in {output}")
    report.plot(output / "accuracy.png", runs, rate)
    report.write(output / "report.md", runs, rate, guide.checks)
    guide.say("accuracy.png, report.md, models/, network.onnx, activations.npy, service.log")

    guide.name(f"Done: {len(guide.checks)} checks passed in {time.perf_counter() - start:.0f} s")
    guide.console.print(_NEXT, markup=False, highlight=False, soft_wrap=True)


class _Guide:
    """Prints each step as it starts, and its result."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.checks: list[str] = []
        self._stops = 0

    def name(self, what: str) -> None:
        self._stops += 1
        self.console.print(f"{self._stops}/{_STOPS} {what}", style="bold", markup=False, soft_wrap=True)

    def say(self, what: str) -> None:
        self.console.print(f"    {what}", markup=False, soft_wrap=True)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            raise CheckFailedError(f"this check failed: {what}")
        self.checks.append(what)
        self.say(f"✓ {what}")


def _train(guide: _Guide, digits: Digits, steps: int) -> dict[bool, Sequence[Run]]:
    """Train every network, with a progress bar for each kind; the keys say whether it is normalized."""
    runs: dict[bool, Sequence[Run]] = {}
    with report.progress(guide.console) as bar:
        for normalized, name in report.NAMES.items():
            task = bar.add_task(name, total=steps * len(RATES), state="")
            runs[normalized] = [
                train(
                    dense_network(PIXELS, normalized=normalized),
                    digits,
                    rate=rate,
                    steps=steps,
                    advance=report.mover(bar, task, EVALUATE_EVERY, f"rate {rate:g}, "),
                )
                for rate in RATES
            ]
    return runs


def _show(guide: _Guide, runs: dict[bool, Sequence[Run]], plain: Run, normalized: Run) -> None:
    head = ("step", *report.NAMES.values())
    title = f"Accuracy at learning rate {plain.rate:g}"
    report.show(guide.console, title, head, report.accuracy_rows(plain, normalized))
    title = f"Steps to {TARGET:.0%}, accuracy at the end"
    report.show(guide.console, title, ("rate", *head[1:]), report.rate_rows(runs))
    guide.check(
        normalized.rank > plain.rank,
        f"at the rate that suits the plain network best, {plain.rate:g}, steps to {TARGET:.0%}: "
        f"{report.steps(normalized)} with batch normalization, {report.steps(plain)} without",
    )


def _run_onnx(guide: _Guide, network: FrozenNetwork, x: Array, path: Path) -> None:
    onnx.save(to_onnx(network), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(["logits"], {"x": x})
    ours = network(x)
    guide.check(
        np.array_equal(theirs.argmax(1), ours.argmax(1)),
        f"{path.name}: the same {len(x)} predictions as ours",
    )
    # Both compute in float32, but add in different orders.
    difference = float(abs(theirs - ours).max() / abs(ours).max())
    guide.check(
        difference < 1e-5, f"{path.name}: logits differ by {difference:.0e} of the largest, in float32"
    )


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
