"""Types shared by the compiled core and the Python package."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray


class FrozenLayer(Protocol):
    """The members of every frozen layer that files and ONNX models are made from."""

    @property
    def channels(self) -> int:
        """Number of channels."""

    @property
    def channel_axis(self) -> int:
        """Axis of x that holds the channels."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the parameters."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters."""


class BatchNormParameters(FrozenLayer, Protocol):
    """A frozen batch norm."""

    @property
    def mean(self) -> NDArray[Any]:
        """E[x], shape (channels,)."""

    @property
    def var(self) -> NDArray[Any]:
        """Var[x], shape (channels,)."""

    @property
    def gamma(self) -> NDArray[Any]:
        """γ, shape (channels,)."""

    @property
    def beta(self) -> NDArray[Any]:
        """β, shape (channels,)."""

    @property
    def eps(self) -> float:
        """ε, which float32 holds exactly."""


class WhiteningParameters(FrozenLayer, Protocol):
    """A frozen whitening layer."""

    @property
    def matrix(self) -> NDArray[Any]:
        """diag(γ)·W, shape (channels, channels / groups)."""

    @property
    def mean(self) -> NDArray[Any]:
        """E[x], shape (channels,)."""

    @property
    def bias(self) -> NDArray[Any]:
        """β, shape (channels,)."""

    @property
    def groups(self) -> int:
        """Number of groups of adjacent channels."""


class _Gradients(NamedTuple):
    dx: NDArray[Any]
    dgamma: NDArray[np.float64]
    dbeta: NDArray[np.float64]


class Gradients(_Gradients):
    """The gradients that a backward pass returns (Ioffe and Szegedy 2015, section 3): a tuple of three.

    Two `Gradients` are equal if all four arrays, dresidual included, are equal in shape and values.

    Attributes:
        dx: ∂ℓ/∂x, of x's shape, dtype and memory order.
        dgamma: ∂ℓ/∂γ = Σ dy·x̂, shape (channels,), float64.
        dbeta: ∂ℓ/∂β = Σ dy, shape (channels,), float64.
        dresidual: ∂ℓ/∂residual, which is not an element of the tuple: the array that was passed in for it, or
            dy itself where the two are equal; None if it was not computed.
    """

    dresidual: NDArray[Any] | None = None

    def __new__(
        cls,
        dx: NDArray[Any],
        dgamma: NDArray[np.float64],
        dbeta: NDArray[np.float64],
        dresidual: NDArray[Any] | None = None,
    ) -> Self:
        """Make the tuple of three, with dresidual as an attribute."""
        self = super().__new__(cls, dx, dgamma, dbeta)
        self.dresidual = dresidual
        return self

    def _replace(self, **changes: Any) -> Self:
        """Return a copy with new values for some of the four arrays."""
        return type(self)(**{**self._asdict(), "dresidual": self.dresidual} | changes)

    __replace__ = _replace  # of copy.replace

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gradients):
            return NotImplemented
        pairs = zip((*self, self.dresidual), (*other, other.dresidual), strict=True)
        return all(a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs)

    __ne__ = object.__ne__  # by __eq__, where a tuple has its own
    __hash__ = None  # type: ignore[assignment]  # as of the arrays

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.dresidual)
