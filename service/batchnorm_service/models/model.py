"""One version of one model, without HTTP or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from batchnorm import FrozenBatchNorm
from batchnorm._kinds import AnyFrozen
from batchnorm_service.errors import InvalidInputError

# NumPy's limit, so that of a tensor.
MAX_RANK: Final = 64


@dataclass(frozen=True)
class Model:
    """One version of one model.

    Attributes:
        name: Name of the model.
        version: Decimal number of the version, as text.
        layer: The layer that computes every answer.
    """

    name: str
    version: str
    layer: AnyFrozen

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes that x may have, the layer's own first."""
        narrow = ("float32", "float16", "bfloat16")
        return ("float64", *narrow) if self.layer.dtype == np.float64 else narrow

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of x at the lowest rank that the layer takes, -1 for any size; higher ranks are allowed."""
        axis = self.layer.channel_axis
        sizes = [-1] * max(2, axis + 1 if axis >= 0 else -axis)
        sizes[axis] = self.layer.channels
        return tuple(sizes)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """What the metadata say of this kind of layer."""
        layer = self.layer
        return {"eps": layer.eps} if isinstance(layer, FrozenBatchNorm) else {"groups": layer.groups}

    def infer(self, x: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return `layer(x)`, written to `out` if that is given.

        Raises:
            InvalidInputError: The layer does not take the dtype or shape of x; the text says why.
        """
        try:
            return self.layer(x, out=out)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(str(error)) from error
