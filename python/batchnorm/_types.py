"""Types shared by the compiled core and the Python package."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Gradients(NamedTuple):
    """What a backward pass returns (Ioffe and Szegedy 2015, section 3).

    Attributes:
        dx: ∂ℓ/∂x, shape, dtype and memory order of x.
        dgamma: ∂ℓ/∂γ = Σ dy·x̂, shape (channels,), float64.
        dbeta: ∂ℓ/∂β = Σ dy, shape (channels,), float64.
    """

    dx: NDArray[Any]
    dgamma: NDArray[np.float64]
    dbeta: NDArray[np.float64]
