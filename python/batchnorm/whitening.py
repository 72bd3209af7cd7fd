"""The trainable layer `Whitening`: parameters, population covariance, train and eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from batchnorm import _core
from batchnorm._checks import channels_where, integer
from batchnorm._core import CoMoments
from batchnorm._trainable import Trainable
from batchnorm._types import Gradients
from batchnorm.covariance import CovariancePopulation, MovingCovariance
from batchnorm.frozen_whitening import FrozenWhitening

Method = Literal["zca", "pca", "cholesky", "iterative"]


@dataclass(frozen=True, slots=True, eq=False)
class _TrainingCache:
    """The cache of a forward pass in train mode, with the same `backward` method as that of eval mode."""

    cache: _core.WhiteningCache

    def backward(self, dy: Any) -> Gradients:
        return _core.whiten_backward(dy, self.cache)


@dataclass(eq=False)
class _Frozen:
    """The layer as it is frozen, and what makes the same without γ and β."""

    layer: FrozenWhitening
    make_plain: Callable[[], FrozenWhitening]

    @cached_property
    def plain(self) -> FrozenWhitening:
        """The layer without γ and β, whose output is x̂; made for the first backward pass, as W takes time."""
        return self.make_plain()


@dataclass(frozen=True, slots=True, eq=False)
class _EvalCache:
    """The cache of a forward pass in eval mode; it holds x by reference."""

    frozen: _Frozen
    x: NDArray[Any]

    def backward(self, dy: Any) -> Gradients:
        dy, axis = _core.tensor("dy", dy), self.frozen.layer.channel_axis
        wide = dy, self.x
        if dy.dtype == self.x.dtype and dy.dtype.itemsize == 2:
            # So that x̂ is not rounded to 16 bits before it is multiplied with dy and summed.
            wide = dy.astype(np.float32), self.x.astype(np.float32)
        # Of x̂ with mean 0 and variance 1, these are Σ dy·x̂ and Σ dy.
        sums = _core.infer_backward(wide[0], self.frozen.plain(wide[1]), 0.0, 1.0, eps=0.0, channel_axis=axis)
        return Gradients(self.frozen.layer.backward(dy), sums.dgamma, sums.dbeta)


class Whitening(Trainable[CovariancePopulation]):
    """Whitening with trainable γ, β and an estimate of the population: y = γ·W(x − μ) + β, W(Λ + εI)Wᵀ = I.

    Ioffe and Szegedy 2015 start from it (section 2, after LeCun et al. 1998) and replace it by normalizing
    each dimension alone, because it costs the covariance matrix Λ, its inverse square root, and the
    derivatives of both. With `groups=channels` it is batch norm.

    A new layer is in train mode: a call whitens by μ and the biased Λ = Σ(x − μ)(x − μ)ᵀ/m of the batch, over
    all m positions (as in batch norm, those of all examples and of all pixels), and updates `population` with
    them. In eval mode a call whitens by W of the population's unbiased Λ. It then uses the parameters as
    `freeze` rounds them, so that the output has exactly the bits of the frozen layer's.

    Args:
        channels: Number of channels.
        method: Which W, of the many that whiten. "zca": (Λ + εI)^(−1/2), which moves x least; "pca":
            D^(−1/2)·Uᵀ, the principal components, largest first, the entry of largest magnitude of each
            eigenvector positive; "cholesky": L⁻¹ with Λ + εI = LLᵀ, so that channel k depends on channels 0
            to k alone; "iterative": zca by Newton-Schulz steps, which are matrix products only.
        groups: Number of groups of D = channels/groups adjacent channels that are whitened apart; it divides
            channels.
        eps: ε, added to the diagonal of Λ; finite and 0 or more. 0 only suits batches of full rank.
        channel_axis: Axis of x that holds the channels; -1 is channels-last.
        affine: Whether there are γ and β; without them `gamma`, `beta` and their gradients are None.
        dtype: dtype of γ, β and their gradients: float32 (for x of 16 or 32 bits) or float64 (for float64 x).
        steps: Number of Newton-Schulz steps, 1 to 100, with `method="iterative"` only; if None, as many as it
            takes, which the dimension D and the condition number of Λ + εI decide.
        shrinkage: None, or "ledoit-wolf": train mode replaces each group's Λ by (1 − δ)Λ + δ·(tr Λ/D)·I with
            the δ of Ledoit and Wolf 2004, for batches with few positions for their channels. The population
            is not shrunk: it estimates the same matrix from many batches.
        population: Estimator of E[x] and Cov[x]; if None, a new `MovingCovariance(update_weight=0.1)`.

    Attributes:
        channels: Number of channels.
        method: The method, as passed in.
        groups: Number of groups, as passed in.
        eps: ε, as passed in.
        channel_axis: Axis of the channels, as passed in.
        dtype: The NumPy dtype of the parameters.
        steps: The number of steps, as passed in.
        shrinkage: The shrinkage, as passed in.
        training: Whether the layer is in train mode; set by `train()` and `eval()`.
        grad_gamma: ∂ℓ/∂γ of the last `backward`, shape (channels,), `dtype`; None before it.
        grad_beta: ∂ℓ/∂β of the last `backward`, shape (channels,), `dtype`; None before it.

    Raises:
        ValueError: A value is out of its range, groups does not divide channels, or steps is given with
            another method than "iterative".
        TypeError: An argument is of a wrong type, or the population is not an estimator.

    Example:
        >>> import numpy as np
        >>> import batchnorm as bn
        >>> layer = bn.Whitening(2, eps=0, dtype="float64")
        >>> x = np.array([[1.0, 2.0], [3.0, 2.0], [1.0, 6.0], [7.0, 2.0]])
        >>> y = layer(x)
        >>> (y.T @ y / 4).round(6).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> dx = layer.backward(np.ones_like(x))
        >>> layer.eval()(x).shape
        (4, 2)
    """

    _STATISTICS = ("mean", "cov")

    def __init__(
        self,
        channels: int,
        *,
        method: Method = "zca",
        groups: int = 1,
        eps: float = 1e-5,
        channel_axis: int = 1,
        affine: bool = True,
        dtype: DTypeLike = "float32",
        steps: int | None = None,
        shrinkage: Literal["ledoit-wolf"] | None = None,
        population: CovariancePopulation | None = None,
    ) -> None:
        super().__init__(
            channels,
            eps=eps,
            affine=affine,
            dtype=dtype,
            channel_axis=channel_axis,
            population=MovingCovariance(update_weight=0.1) if population is None else population,
        )
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps: was {eps!r}, wanted a finite number >= 0")
        if method not in get_args(Method):
            raise ValueError(f"method: was {method!r}, wanted one of {', '.join(get_args(Method))}")
        self.method = method
        self.groups = integer("groups", groups)
        if self.groups < 1 or self.channels % self.groups:
            raise ValueError(f"groups: was {groups}, wanted a divisor of {self.channels} channels")
        self.steps = None if steps is None else integer("steps", steps)
        if self.steps is not None and method != "iterative":
            raise ValueError(f'steps: was {steps} with method={method!r}, wanted None or method="iterative"')
        if self.steps is not None and not 1 <= self.steps <= 100:
            raise ValueError(f"steps: was {steps}, wanted 1 to 100")
        if shrinkage not in (None, "ledoit-wolf"):
            raise ValueError(f'shrinkage: was {shrinkage!r}, wanted "ledoit-wolf" or None')
        self.shrinkage = shrinkage

    def __call__(self, x: Any) -> NDArray[Any]:
        """Whiten a batch: y = γ·W(x − μ) + β.

        The layer keeps what `backward` needs, x by reference.

        Args:
            x: Array of rank 2 or more with `channels` entries on `channel_axis`; float16, bfloat16 or
                float32 for a float32 layer, float64 for a float64 layer.

        Returns:
            y, of the shape, dtype and memory order of x.

        Raises:
            ValueError: The number of channels is wrong; in train mode also if statistics are not finite,
                there are fewer than 2 positions, or Λ + εI is singular to float64 (with ε = 0: fewer
                positions than channels, a constant channel, or channels that depend on each other); in eval
                mode also if the population is not ready or its Λ + εI is singular. Nothing is changed then.
            TypeError: A layer of this dtype does not take x of its dtype.

        Warns:
            UserWarning: The steps of "iterative" leave an entry of I − W(Λ + εI)Wᵀ above 1e-3.
        """
        x = self._batch(x)
        if not self.training:
            frozen = self._frozen()
            y = frozen.layer(x)
            self._cache = _EvalCache(frozen, x)
            return y
        try:
            y, cache = _core.whiten_forward(
                x,
                self.gamma,
                self.beta,
                method=self.method,
                groups=self.groups,
                eps=self.eps,
                steps=self.steps,
                shrinkage=self.shrinkage,
                channel_axis=self.channel_axis,
            )
        except ValueError:
            moments = _core.moments(x, channel_axis=self.channel_axis)
            if bad := channels_where(~(np.isfinite(moments.mean) & np.isfinite(moments.m2))):
                raise ValueError(f"x: the batch has non-finite statistics in {bad}") from None
            raise
        comoments = cache.comoments
        self.population.update(comoments)
        self._cache = _TrainingCache(cache)
        if self._observers:
            self._observe(x, comoments.moments)
        return y

    def backward(self, dy: Any) -> NDArray[Any]:
        """Compute the gradients of the last forward pass; overwrites `grad_gamma` and `grad_beta`.

        If that pass ran in train mode, the gradient passes through μ, Λ, W and a shrinkage's δ; if in eval
        mode, they are constants. It may be called again for the same forward pass.

        Args:
            dy: ∂ℓ/∂y, of y's shape and dtype.

        Returns:
            ∂ℓ/∂x, of the shape, dtype and memory order of x.

        Raises:
            RuntimeError: There was no forward pass.
            ValueError: dy has another shape than y; or method is "pca", the pass ran in train mode, and two
                eigenvalues (named) are closer than a relative 1e-8, where W has no derivative.
            TypeError: dy has another dtype than y.
        """
        return self._backward(dy)

    def freeze(self, dtype: DTypeLike | None = None) -> FrozenWhitening:
        """Return the layer as a `FrozenWhitening`: diag(γ)·W of the population's Λ, E[x] and β, rounded once.

        Args:
            dtype: dtype of the frozen parameters, float32 or float64; if None, that of this layer.

        Raises:
            ValueError: The population is not ready, has other channels or groups, its Λ + εI is singular, or
                rounding makes a parameter invalid.

        Warns:
            UserWarning: The steps of "iterative" leave an entry of I − W(Λ + εI)Wᵀ above 1e-3, or rounding
                moves y by more than 1e-4 of its standard deviation (see `FrozenWhitening.from_comoments`).
        """
        return FrozenWhitening.from_comoments(
            self._comoments(),
            self.gamma,
            self.beta,
            method=self.method,
            eps=self.eps,
            steps=self.steps,
            channel_axis=self.channel_axis,
            dtype=self.dtype if dtype is None else dtype,
        )

    def _comoments(self) -> CoMoments:
        """Return co-moments with the population's mean and covariance."""
        self._check_shapes(self.population, "population: shape was")
        # Of a count of 2, so that the unbiased covariance scatter/(count − 1) is the scatter matrix itself.
        return CoMoments(2.0, self.population.mean, self.population.cov)

    def _frozen(self) -> _Frozen:
        def make() -> _Frozen:
            return _Frozen(
                self.freeze(), partial(_plain, self._comoments(), self.channel_axis, self.dtype, **options)
            )

        options: dict[str, Any] = {"method": self.method, "eps": self.eps, "steps": self.steps}
        return self._kept(make, self.groups, self.channel_axis, *options.values())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        size = self.channels // self.groups
        return super()._shapes() | {"cov": (self.groups, size, size)}

    def __repr__(self) -> str:
        return (
            f"Whitening({self.channels}, method={self.method!r}, groups={self.groups}, eps={self.eps!r}, "
            f"channel_axis={self.channel_axis}, affine={self.affine}, dtype={self.dtype.name!r}, "
            f"steps={self.steps}, shrinkage={self.shrinkage!r}, population={self.population!r})"
        )


def _plain(comoments: CoMoments, channel_axis: int, dtype: np.dtype[Any], **options: Any) -> FrozenWhitening:
    """Return the frozen layer of a population without γ and β."""
    matrix = _core.whitening_matrix(comoments.cov_unbiased, **options).reshape(comoments.channels, -1)
    return FrozenWhitening(matrix, comoments.mean, channel_axis=channel_axis, dtype=dtype)
