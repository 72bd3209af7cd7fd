"""Estimators of the population statistics E[x], Var[x] that a frozen layer normalizes by.

They take the `Moments` of one training batch after another and keep float64 averages. These are computed in
plain NumPy in the order of the updates, so that equal batches in equal order give equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._checks import channels_where, finite_vector, mapping, number, of_channels
from batchnorm._core import Moments


class Estimator(Protocol):
    """What a trainable layer needs of its population beside the statistics themselves."""

    @property
    def ready(self) -> bool:
        """Whether the estimates have a value."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Estimate of E[x], shape (channels,); raises ValueError while not ready."""

    def reset(self) -> None:
        """Forget every batch."""

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return a copy of the state; empty while not ready."""

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Replace the state by a copy of `state`, or raise and change nothing."""


class Population(Estimator, Protocol):
    """The protocol of an estimator for `BatchNorm`; a class of your own needs these members."""

    @property
    def var(self) -> NDArray[np.float64]:
        """Unbiased estimate of Var[x], shape (channels,); raises ValueError while not ready."""

    def update(self, moments: Moments) -> None:
        """Update the estimate with one batch, or raise ValueError naming the channels and change nothing."""


class ArrayState:
    """An estimator whose state is float64 arrays by name; subclasses say which, and compute with them."""

    def __init__(self) -> None:
        self._state: dict[str, NDArray[np.float64]] = {}

    @property
    def ready(self) -> bool:
        """Whether a batch has been added, or a state loaded."""
        return bool(self._state)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Estimate of E[x], float64, shape (channels,).

        Raises:
            ValueError: Not ready.
        """
        return self._get("mean")

    def reset(self) -> None:
        """Forget every batch; the estimator is not ready until the next update."""
        self._state = {}

    def state_dict(self) -> dict[str, NDArray[np.float64]]:
        """Return a copy of the state: float64 arrays, or none while not ready."""
        return {name: array.copy() for name, array in self._state.items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Replace the state by a copy of `state`; an empty `state` is that before the first update.

        Args:
            state: What `state_dict` of the same kind of estimator returned.

        Raises:
            ValueError: Keys are missing or unknown, shapes differ, or values are impossible for any batches;
                nothing is changed then.
            TypeError: `state` is not a mapping, or an array in it is not real, has a mask or requires grad.
        """
        mapping("state", state, "state_dict()")
        names = self._names()
        if state and set(state) != set(names):
            raise ValueError(f"state: keys were {sorted(state)}, wanted {sorted(names)} or none")
        self._state = self._loaded({name: state[name] for name in names}) if state else {}

    def _names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def _loaded(self, state: dict[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
        """Return copies of the arrays of a state, or raise if no batches can lead to them."""
        raise NotImplementedError

    def _get(self, name: str) -> NDArray[np.float64]:
        if not self.ready:
            raise ValueError(
                f"population: {type(self).__name__} has seen no batch; run forward passes in train mode "
                "or load a state first"
            )
        return self._state[name].copy()


class _Averages(ArrayState):
    """Float64 averages of batch means and of unbiased batch variances; subclasses choose the weights."""

    @property
    def var(self) -> NDArray[np.float64]:
        """Unbiased estimate of Var[x], float64, shape (channels,).

        Raises:
            ValueError: Not ready.
        """
        return self._get("var")

    def _names(self) -> tuple[str, ...]:
        return ("mean", "var")

    def _loaded(self, state: dict[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
        loaded = {name: finite_vector(f"state[{name!r}]", value, np.float64) for name, value in state.items()}
        shapes = {name: array.shape for name, array in loaded.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"state: shapes were {shapes}, wanted one number of channels")
        self._check_possible(loaded)
        return loaded

    def _check_possible(self, state: dict[str, NDArray[np.float64]]) -> None:
        """Raise ValueError if no batches can lead to these finite values."""
        if bad := channels_where(state["var"] < 0):
            raise ValueError(f"state['var']: negative in {bad}, wanted values >= 0")

    def _enter(self, state: dict[str, NDArray[np.float64]]) -> None:
        """Replace the state by the one updated with a batch, or raise if float64 cannot hold it."""
        if bad := channels_where(~(np.isfinite(state["mean"]) & np.isfinite(state["var"]))):
            raise ValueError(f"moments: the batch is too far from those before it for float64 in {bad}")
        self._state = state

    def _checked(self, moments: Moments) -> tuple[NDArray[np.float64], ...]:
        """Return count, mean and unbiased variance of a batch, or raise if it must not enter the averages."""
        count, mean, m2 = moments.count, moments.mean, moments.m2
        if self.ready and mean.shape != self._state["mean"].shape:
            raise ValueError(f"moments: {of_channels(mean.size)}, wanted {self._state['mean'].size}")
        if bad := channels_where(~(np.isfinite(mean) & np.isfinite(m2))):
            raise ValueError(f"moments: the batch has non-finite statistics in {bad}")
        if bad := channels_where(~(count > 1)):
            raise ValueError(f"moments: the batch has fewer than 2 values in {bad}")
        return count, mean, moments.var_unbiased


class MovingAverage(_Averages):
    """Exponential moving average over training batches: new = (1 - w)·old + w·batch.

    It starts at mean 0 and variance 1, and averages the unbiased variances m/(m-1)·σ_B² of batches, as
    PyTorch's running statistics do. Ioffe and Szegedy 2015, section 3.1, propose moving averages for
    tracking the accuracy of a model while it trains.

    Args:
        update_weight: The weight w of the new batch, 0 < w <= 1.

    Raises:
        ValueError: `update_weight` is out of its range.
        TypeError: `update_weight` is not a number.

    Example:
        >>> import numpy as np
        >>> import batchnorm as bn
        >>> population = bn.MovingAverage(update_weight=0.5)
        >>> population.update(bn.moments(np.array([[1.0], [3.0]])))
        >>> population.mean, population.var
        (array([1.]), array([1.5]))
    """

    def __init__(self, update_weight: float) -> None:
        weight = number("update_weight", update_weight)
        if not 0 < weight <= 1:
            raise ValueError(f"update_weight: was {update_weight!r}, wanted 0 < update_weight <= 1")
        super().__init__()
        self._weight = weight

    @property
    def update_weight(self) -> float:
        """The weight w of the new batch."""
        return self._weight

    @np.errstate(all="ignore")  # what float64 cannot hold is asked of the result
    def update(self, moments: Moments) -> None:
        """Take in one batch.

        Args:
            moments: Statistics of the batch, as `cache.moments` or `batchnorm.moments` give them.

        Raises:
            ValueError: Another number of channels than before, non-finite statistics, fewer than 2 values in
                a channel, or statistics too far from those before; nothing is changed then.
        """
        _, mean, var = self._checked(moments)
        old = self._state or {"mean": np.zeros_like(mean), "var": np.ones_like(var)}
        w = self._weight
        self._enter({"mean": (1 - w) * old["mean"] + w * mean, "var": (1 - w) * old["var"] + w * var})

    def __repr__(self) -> str:
        return f"MovingAverage(update_weight={self._weight!r})"


class Algorithm2(_Averages):
    """Population statistics by Algorithm 2 of Ioffe and Szegedy 2015 (step 10), collected after training.

    Over batches b of m_b values with mean μ_b, sum of squared deviations M2_b and biased variance σ_b²:

    - `weighting="count"`: E[x] = Σ m_b·μ_b / Σ m_b, Var[x] = Σ M2_b / Σ (m_b - 1);
    - `weighting="equal"`, as the paper writes it: E[x] is the mean of μ_b, and Var[x] the mean of
      m_b/(m_b - 1)·σ_b².

    The two agree if all batches have the same size. As in the paper, Var[x] averages the variances *within*
    batches.

    Do not collect while the network trains: the activations of early batches come from weights that have
    changed since. Train first, then set a new `Algorithm2()` and run forward passes in train mode without
    optimizer steps::

        layer.population = batchnorm.Algorithm2()
        for x in batches:
            network(x)                      # layer.training is True; no backward pass, no step
        frozen = layer.freeze()

    Args:
        weighting: "count" or "equal".

    Raises:
        ValueError: `weighting` is neither.
    """

    def __init__(self, weighting: Literal["count", "equal"] = "count") -> None:
        if weighting not in ("count", "equal"):
            raise ValueError(f'weighting: was {weighting!r}, wanted "count" or "equal"')
        super().__init__()
        self._weighting = weighting

    @property
    def weighting(self) -> str:
        """How batches are weighted: "count" or "equal"."""
        return self._weighting

    @np.errstate(all="ignore")  # what float64 cannot hold is asked of the result
    def update(self, moments: Moments) -> None:
        """Take in one batch.

        Args:
            moments: Statistics of the batch, as `cache.moments` or `batchnorm.moments` give them.

        Raises:
            ValueError: Another number of channels than before, non-finite statistics, fewer than 2 values in
                a channel, or statistics too far from those before; nothing is changed then.
        """
        count, mean, var = self._checked(moments)
        old = self._state or {name: np.zeros_like(mean) for name in self._names()}
        batches = old["batches"] + 1
        if self._weighting == "equal":
            of_mean = of_var = 1 / batches
            sums = {"batches": batches}
        else:
            values = old["values"] + count
            of_mean, of_var = count / values, (count - 1) / (values - batches)
            sums = {"batches": batches, "values": values}
        # Both weightings are weighted averages, of μ_b and of M2_b/(m_b - 1). Stepping toward each batch by
        # its share keeps every intermediate as large as the data, where a sum of m_b·μ_b would grow with the
        # run.
        self._enter(
            {
                "mean": old["mean"] + (mean - old["mean"]) * of_mean,
                "var": old["var"] + (var - old["var"]) * of_var,
                **sums,
            }
        )

    def _names(self) -> tuple[str, ...]:
        # The keys differ by weighting, so that the state of one cannot be loaded into the other.
        names = ("mean", "var", "batches")
        return (*names, "values") if self._weighting == "count" else names

    def _check_possible(self, state: dict[str, NDArray[np.float64]]) -> None:
        super()._check_possible(state)
        batches = state["batches"]
        # A batch enters all channels or none, so they all have the same number of them.
        if not (batches[0] >= 1 and batches[0].is_integer() and (batches == batches[0]).all()):
            wanted = "one whole number, 1 or more, for all channels"
            raise ValueError(f"state['batches']: was {batches.tolist()}, wanted {wanted}")
        if "values" in state and (bad := channels_where(state["values"] <= batches)):
            wanted = "more than 1 value a batch"
            raise ValueError(f"state['values']: not more than state['batches'] in {bad}, wanted {wanted}")

    def __repr__(self) -> str:
        return f"Algorithm2(weighting={self._weighting!r})"
