"""The tensors of a row, what we make of them, and how far an answer is from it and from exact arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import batchnorm as bn
import oracle
from batchnorm._core import copy
from bench.rows import BACKWARD, DTYPES, FORWARD, INFERENCE, Row

EPS = 1e-5
Array = NDArray[Any]
Call = Callable[[], Any]
# A peer that differs from us by more computes something else. Peers accumulate in their own precision.
TOLERANCE = {"float64": 1e-7, "float32": 2e-3, "float16": 3e-2, "bfloat16": 0.15}


@dataclass
class Case:
    """A row with its tensors: x and dy of ordinary size, `out` to be overwritten by whoever is timed."""

    row: Row
    x: Array
    dy: Array
    out: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    wanted: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row) -> Case:
        """Seeded tensors; every page is touched."""
        rng = np.random.default_rng(0)
        dtype, channels = DTYPES[row.dtype], row.shape[row.axis]
        parameters = np.float64 if row.dtype == "float64" else np.float32
        x, dy = (rng.standard_normal(row.shape, dtype=np.float32) for _ in range(2))
        x *= 2
        x += 3
        gamma = rng.normal(1, 0.2, channels).astype(parameters)
        beta, mean = (rng.normal(at, 0.2, channels).astype(parameters) for at in (0, 3))
        var = rng.uniform(3, 5, channels).astype(parameters)
        x, dy = (a.astype(dtype, copy=False) for a in (x, dy))
        return cls(row, x, dy, np.ones_like(x), gamma, beta, mean, var)

    def rows(self, a: Array) -> Array:
        """`a` with the channels on axis 1, without a copy: of channels-last tensors a row for each pixel."""
        return a.reshape(-1, a.shape[-1]) if self.row.axis == -1 else a

    def beside(self, p: Array) -> Array:
        """(channels,) shaped to stand beside `rows(x)`."""
        return p.reshape(1, -1, *[1] * (self.rows(self.x).ndim - 2))

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes of `rows(x)` that statistics run over."""
        return tuple(k for k in range(self.rows(self.x).ndim) if k != 1)

    @property
    def narrow(self) -> bool:
        """Whether elements have 16 bits."""
        return self.x.dtype.itemsize == 2

    def ours(self, *, fresh: bool = False) -> dict[str, Call]:
        """Our three passes, into `out` or into fresh memory."""
        options = {"eps": EPS, "channel_axis": self.row.axis}
        out = None if fresh else self.out

        def forward() -> Array:
            return bn.train_forward(self.x, self.gamma, self.beta, out=out, **options)[0]

        def infer() -> Array:
            return bn.infer(self.x, self.mean, self.var, self.gamma, self.beta, out=out, **options)

        def backward() -> Array:
            return bn.backward(self.dy, self.cache, out=out).dx

        return {FORWARD: forward, INFERENCE: infer, BACKWARD: backward}

    @functools.cached_property
    def cache(self) -> bn.Cache:
        """What our backward pass needs."""
        return bn.train_forward(self.x, self.gamma, self.beta, eps=EPS, channel_axis=self.row.axis)[1]

    def floors(self, direction: str) -> dict[str, Call]:
        """Copies of the same bytes on the same threads; 16-bit elements in pairs: x + z is cheap."""
        x, dy, out = (a.view(np.float32) if self.narrow else a for a in (self.x, self.dy, self.out))
        inputs = {"z": dy} if direction == BACKWARD else {}
        return {
            "floor, regular": lambda: copy(x, out, **inputs),
            "floor, streaming": lambda: copy(x, out, streaming=True, **inputs),
        }

    def answer_all(self) -> None:
        """Keeps what we answer, for `difference`."""
        for direction, call in self.ours().items():
            self.wanted[direction] = call().copy()

    def difference(self, direction: str, answer: Array) -> float:
        """The largest difference of an answer from ours, relative to the largest of ours."""
        wanted = self.rows(self.wanted[direction]).astype(np.float32, copy=self.narrow)
        answer = np.asarray(answer).astype(np.float32, copy=self.narrow)
        return float(abs(answer.reshape(wanted.shape) - wanted).max() / abs(wanted).max())

    def exact(self) -> Iterator[tuple[str, Any]]:
        """Forward and inference in extended precision, of three channels."""
        x, k = self.rows(self.x)[:, self.seen], self.seen
        yield FORWARD, oracle.forward(x, self.gamma[k], self.beta[k], EPS)
        population = self.mean[k], self.var[k]
        yield INFERENCE, oracle.forward(x, self.gamma[k], self.beta[k], EPS, population=population)

    @property
    def seen(self) -> list[int]:
        """The channels that `exact` looks at."""
        last = self.row.shape[self.row.axis] - 1
        return sorted({0, last // 2, last})

    def error(self, answer: Array, exact: Any) -> float:
        """The largest error of an answer on those channels, in ulps as contract 2 counts them."""
        y = np.asarray(answer).reshape(self.rows(self.x).shape)[:, self.seen]
        return oracle.error_in_ulps(y, exact)
