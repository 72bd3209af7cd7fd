"""What `replace` did with each batch norm of a model, and why not more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What was done with one batch norm.

    Attributes:
        name: Its name in the model, as `named_modules` gives it; the first one if it has several.
        kind: The class that it had.
        replaced: Whether it is a layer of this package now.
        fused: What it does in the same pass: "relu", "relu6", "residual", "residual, relu",
            "residual, relu6", or "" for nothing.
        reason: Why it was not replaced, or not fused; "" if there is nothing to say.
    """

    name: str
    kind: str
    replaced: bool
    fused: str = ""
    reason: str = ""

    def __str__(self) -> str:
        done = f"fused with {self.fused}" if self.fused else "replaced" if self.replaced else "left as it is"
        return f"{self.name or '(model)'} ({self.kind}): {done}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Report:
    """What was done with each batch norm of a model; printed, it has one line for each.

    Attributes:
        layers: One entry for each batch norm, in the order of `named_modules`.
    """

    layers: tuple[LayerReport, ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the layers that were replaced."""
        return tuple(layer.name for layer in self.layers if layer.replaced)

    @property
    def fused(self) -> dict[str, str]:
        """Names of the layers that were fused, each with what was fused into it."""
        return {layer.name: layer.fused for layer in self.layers if layer.fused}

    def __getitem__(self, name: str) -> LayerReport:
        """Return the entry of the layer with this name; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        counts = f"{len(self)} batch norms, {len(self.replaced)} replaced, {len(self.fused)} of them fused"
        return "\n".join((counts, *map(str, self.layers)))
