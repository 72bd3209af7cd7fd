"""Types shared by the compiled core and the Python package."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class _Gradients(NamedTuple):
    dx: NDArray[Any]
    dgamma: NDArray[np.float64]
    dbeta: NDArray[np.float64]


class Gradients(_Gradients):
    """What a backward pass returns (Ioffe and Szegedy 2015, section 3): a tuple of three.

    Attributes:
        dx: ∂ℓ/∂x, shape, dtype and memory order of x.
        dgamma: ∂ℓ/∂γ = Σ dy·x̂, shape (channels,), float64.
        dbeta: ∂ℓ/∂β = Σ dy, shape (channels,), float64.
        dresidual: ∂ℓ/∂residual, not an element of the tuple: the array that was given for it, or dy where
            it is dy; None where it was not computed.
    """

    dresidual: NDArray[Any] | None = None
