"""Estimators of the population statistics E[x] and Λ = Cov[x] that a frozen whitening layer uses.

They take the `CoMoments` of one training batch after another and keep float64 values of Λ, not of the
whitening matrix W. W is not linear in Λ: W of the population's Λ whitens the population, while an average of
the batches' W whitens nothing. It would be too large, as the average of 1/√v is more than 1/√ of the average
v, and the eigenvectors of pca change sign and order from batch to batch, so that they would cancel.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._checks import channels_where, finite_vector, number, of_channels
from batchnorm._core import CoMoments, real_array
from batchnorm.population import ArrayState, Estimator


class CovariancePopulation(Estimator, Protocol):
    """The protocol of an estimator for `Whitening`; a class of your own needs these members."""

    @property
    def cov(self) -> NDArray[np.float64]:
        """Unbiased estimate of Λ, shape (groups, D, D); raises ValueError while not ready."""

    def update(self, comoments: CoMoments) -> None:
        """Update the estimate with one batch, or raise ValueError naming the channels and change nothing."""


class _Covariances(ArrayState):
    """What the estimators of covariances share: checks of a batch and of a state."""

    _MATRICES: str
    """The name, in the state, of the array of shape (groups, D, D)."""

    def _checked(self, comoments: CoMoments) -> None:
        """Raise if a batch must not enter the estimate."""
        if self.ready and comoments.scatter.shape != self._state[self._MATRICES].shape:
            groups, size, _ = self._state[self._MATRICES].shape
            found = f"{of_channels(comoments.channels)} in {_of_groups(comoments.groups)}"
            raise ValueError(f"comoments: {found}, wanted {groups * size} in {groups}")
        if not comoments.count > 1:
            raise ValueError(f"comoments: the batch has {comoments.count:g} positions, wanted 2 or more")
        variances = np.diagonal(comoments.scatter, axis1=1, axis2=2).ravel()
        if bad := channels_where(~(np.isfinite(comoments.mean) & np.isfinite(variances))):
            raise ValueError(f"comoments: the batch has non-finite statistics in {bad}")

    def _enter(self, state: dict[str, NDArray[np.float64]]) -> None:
        """Replace the state by the one updated with a batch, or raise if float64 cannot hold it."""
        if not all(np.isfinite(array).all() for array in state.values()):
            raise ValueError("comoments: the batch is too far from those before it for float64")
        self._state = state

    @np.errstate(all="ignore")  # what float64 cannot hold is asked of the result
    def _loaded(self, state: dict[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
        name = f"state[{self._MATRICES!r}]"
        mean = finite_vector("state['mean']", state["mean"], np.float64)
        matrices = real_array(name, state[self._MATRICES]).astype(np.float64)
        shape = matrices.shape
        if len(shape) != 3 or shape[1] != shape[2] or shape[0] * shape[1] != mean.size:
            wanted = f"(groups, D, D) with groups·D = {mean.size}, as in state['mean']"
            raise ValueError(f"{name}: shape was {shape}, wanted {wanted}")
        if not np.isfinite(matrices).all():
            raise ValueError(f"{name}: was not finite, wanted finite values")
        if (matrices != matrices.transpose(0, 2, 1)).any():
            raise ValueError(f"{name}: was not symmetric, wanted symmetric matrices")
        if bad := channels_where(np.diagonal(matrices, axis1=1, axis2=2).ravel() < 0):
            raise ValueError(f"{name}: negative variance in {bad}, wanted values >= 0")
        return {"mean": mean, self._MATRICES: matrices}


class MovingCovariance(_Covariances):
    """Exponential moving average of mean and covariance over training batches: new = (1 − w)·old + w·batch.

    It starts at mean 0 and covariance I, and averages the unbiased covariances S/(m − 1) of batches with
    scatter matrix S of m positions: the mean over batches of the biased Λ = S/m, which training uses, is
    (m − 1)/m of the population's. It is `MovingAverage` (Ioffe and Szegedy 2015, section 3.1) for matrices;
    on the diagonal it has the same values. It averages Λ and not the whitening matrix W: W of the average is
    the whitening of the data, the average of W is not.

    Args:
        update_weight: The weight w of the new batch, 0 < w <= 1.

    Raises:
        ValueError: `update_weight` is out of its range.
        TypeError: `update_weight` is not a number.

    Example:
        >>> import numpy as np
        >>> import batchnorm as bn
        >>> population = bn.MovingCovariance(update_weight=0.5)
        >>> population.update(bn.comoments(np.array([[1.0, 2.0], [3.0, 6.0]])))
        >>> population.mean.tolist(), population.cov.tolist()
        ([1.0, 2.0], [[[1.5, 2.0], [2.0, 4.5]]])
    """

    _MATRICES = "cov"

    def __init__(self, update_weight: float = 0.1) -> None:
        weight = number("update_weight", update_weight)
        if not 0 < weight <= 1:
            raise ValueError(f"update_weight: was {update_weight!r}, wanted 0 < update_weight <= 1")
        super().__init__()
        self._weight = weight

    @property
    def update_weight(self) -> float:
        """The weight w of the new batch."""
        return self._weight

    @property
    def cov(self) -> NDArray[np.float64]:
        """Unbiased estimate of the covariance Λ, float64, shape (groups, D, D).

        Raises:
            ValueError: Not ready.
        """
        return self._get("cov")

    @np.errstate(all="ignore")  # what float64 cannot hold is asked of the result
    def update(self, comoments: CoMoments) -> None:
        """Take in one batch.

        Args:
            comoments: Statistics of the batch, as `cache.comoments` or `batchnorm.comoments` give them.

        Raises:
            ValueError: Other channels or groups than before, non-finite statistics, fewer than 2 positions,
                or statistics too far from those before; nothing is changed then.
        """
        self._checked(comoments)
        mean, cov = comoments.mean, comoments.cov_unbiased
        identity = np.broadcast_to(np.eye(cov.shape[1]), cov.shape)
        old = self._state or {"mean": np.zeros_like(mean), "cov": identity}
        w = self._weight
        self._enter({"mean": (1 - w) * old["mean"] + w * mean, "cov": (1 - w) * old["cov"] + w * cov})

    def _names(self) -> tuple[str, ...]:
        return ("mean", "cov")

    def __repr__(self) -> str:
        return f"MovingCovariance(update_weight={self._weight!r})"


class PooledCovariance(_Covariances):
    """Mean and covariance of all positions of all batches, exactly: Λ = Σ(x − E[x])(x − E[x])ᵀ/(M − 1).

    M is the number of positions in all batches together. The co-moments of batches are merged (Chan, Golub
    and LeVeque 1979), so that batches of any sizes give the unbiased covariance of their union, up to the
    rounding of float64. Other than `Algorithm2`, which averages variances *within* batches, it counts the
    differences between the means of batches too.

    Do not collect while the network trains: the activations of early batches come from weights that have
    changed since. Train first, then set a new `PooledCovariance()` and run forward passes in train mode
    without optimizer steps, as `Algorithm2` shows. It keeps Λ and not the whitening matrix W: W of the whole
    data's Λ whitens the data, an average of the batches' W does not.

    Example:
        >>> import numpy as np
        >>> import batchnorm as bn
        >>> population = bn.PooledCovariance()
        >>> population.update(bn.comoments(np.array([[1.0, 2.0], [3.0, 6.0]])))
        >>> population.update(bn.comoments(np.array([[5.0, 1.0], [7.0, 7.0]])))
        >>> population.mean.tolist(), (3 * population.cov).tolist()
        ([4.0, 4.0], [[[20.0, 10.0], [10.0, 26.0]]])
    """

    _MATRICES = "scatter"

    @property
    def cov(self) -> NDArray[np.float64]:
        """Unbiased covariance Λ of all positions, float64, shape (groups, D, D).

        Raises:
            ValueError: Not ready.
        """
        with np.errstate(all="ignore"):
            return self._get("scatter") / (self._state["count"] - 1)

    @np.errstate(all="ignore")  # what float64 cannot hold is asked of the result
    def update(self, comoments: CoMoments) -> None:
        """Take in one batch.

        Args:
            comoments: Statistics of the batch, as `cache.comoments` or `batchnorm.comoments` give them.

        Raises:
            ValueError: Other channels or groups than before, non-finite statistics, fewer than 2 positions,
                or statistics too far from those before; nothing is changed then.
        """
        self._checked(comoments)
        if old := self._state:
            comoments = CoMoments(float(old["count"]), old["mean"], old["scatter"]).merge(comoments)
        count = np.asarray(comoments.count, np.float64)
        self._enter({"count": count, "mean": comoments.mean, "scatter": comoments.scatter})

    def _names(self) -> tuple[str, ...]:
        return ("count", "mean", "scatter")

    def _loaded(self, state: dict[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
        count = real_array("state['count']", state["count"]).astype(np.float64)
        if count.shape != () or not 1 < count < np.inf:
            raise ValueError(f"state['count']: was {count.tolist()}, wanted one finite number > 1")
        return {"count": count} | super()._loaded(state)

    def __repr__(self) -> str:
        return "PooledCovariance()"


def _of_groups(number: int) -> str:
    return f"{number} group{'' if number == 1 else 's'}"
