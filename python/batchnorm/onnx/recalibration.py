"""What `recalibrate` reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from batchnorm.onnx.outputs import Outcome
from batchnorm.shift import Shift


@dataclass(frozen=True, slots=True)
class RecalibratedLayer:
    """What has changed in one batch normalization.

    Attributes:
        name: The name of the node, or of its first output; see `frozen_layers`.
        channels: The number of channels.
        values: The number of values that were measured in each channel.
        shift: How far the new statistics, as they were written, are from the old ones: among others
            `mean_shift`, in units of the old σ = √(var + ε), and `log_variance_ratio`, ln of the ratio of the
            variances with ε. `z` takes the new statistics as those of so many values. None if the old
            statistics were negative variances or not finite.
        constant: The channels whose measured variance is 0.
    """

    name: str
    channels: int
    values: int
    shift: Shift | None
    constant: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the entries for JSON, with mean and largest shift over the channels by size."""
        moved = self.shift and self.shift.summary()
        return {
            "name": self.name,
            "channels": self.channels,
            "values": self.values,
            **{
                measure: moved and {"mean": _number(moved[measure].mean), "max": _number(moved[measure].max)}
                for measure in ("mean_shift", "log_variance_ratio")
            },
            "constant": list(self.constant),
        }


@dataclass(frozen=True, slots=True)
class Recalibration:
    """What `recalibrate` has measured and changed.

    Attributes:
        layers: The layers that have new statistics, in the order of the nodes.
        population: "algorithm2" or "pooled".
        reason: Why that population was taken.
        layerwise: Whether each layer was measured with the new statistics of those before it.
        blend: The weight of what was measured.
        batches: The number of batches of data.
        left_out: The number of examples at the end that fill no batch of the size that the model fixes.
        passes: How often the data were gone over to measure.
        memory: The most bytes of inputs of layers that were held for one batch.
        before: The first output before, compared with labels or reference; None without these.
        after: The first output after; likewise.
    """

    layers: tuple[RecalibratedLayer, ...]
    population: str
    reason: str
    layerwise: bool
    blend: float
    batches: int
    left_out: int
    passes: int
    memory: int
    before: Outcome | None
    after: Outcome | None

    def to_dict(self) -> dict[str, Any]:
        """Return all entries for JSON; a number that is not finite is None."""
        found: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        found["layers"] = [layer.to_dict() for layer in self.layers]
        for name in ("before", "after"):
            outcome = getattr(self, name)
            found[name] = outcome and {key: _number(getattr(outcome, key)) for key in outcome.__slots__}
        return found


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
