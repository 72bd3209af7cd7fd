"""What the checks of a model can find: the names of the findings, what each means, and what to do."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Severity: TypeAlias = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
"""From the least to the most severe."""


class Rule(NamedTuple):
    """A kind of finding.

    Attributes:
        severity: How severe it is; where that depends on the case, both, the lesser first.
        what: What is wrong.
        remedy: What to do.
    """

    severity: str
    what: str
    remedy: str


RULES: dict[str, Rule] = {
    "training-mode": Rule(
        "error",
        "The node normalizes by the statistics of each batch, not by its running ones.",
        "Export the network in evaluation mode, or `batchnorm lint --fix` if nothing hinders it.",
    ),
    "damaged": Rule(
        "error",
        "A parameter or attribute is missing, cannot be read, or has a wrong type or shape.",
        "Export the model again; keep files with data beside it.",
    ),
    "non-finite": Rule(
        "error",
        "A parameter is NaN or infinite, so the channel's results are too.",
        "`batchnorm recalibrate` for mean and var, else train again; training or a type overflowed.",
    ),
    "negative-variance": Rule(
        "error",
        "A variance is negative, which no data have.",
        "`batchnorm recalibrate`; the values are damaged, or were computed as E[x²] − E[x]² with rounding.",
    ),
    "zero-variance": Rule(
        "warning or error",
        "A variance is 0: the channel was constant. With ε = 0 its results are not finite.",
        "`batchnorm recalibrate` on data in which the channel varies, or prune the channel.",
    ),
    "tiny-variance": Rule(
        "info",
        "A variance is at most ε, or subnormal, so that ε decides the scale of the channel.",
        "Look whether the channel is in use; prune it, or `batchnorm recalibrate`.",
    ),
    "eps": Rule(
        "warning or error",
        "ε is 0 (warning), or negative or not finite (error).",
        "Set epsilon to the value of the training, 1e-5 by default.",
    ),
    "large-eps": Rule(
        "warning",
        "ε is larger than the variance in more than half of the channels.",
        "Check that ε is that of the training, and the variance not a standard deviation or an inverse.",
    ),
    "cancellation": Rule(
        "warning",
        "|mean|/√(var + ε) is so large that a runtime that computes x·s + t in the type of x loses digits: "
        "more than 3 in float32, 12 in float64, 1 in 16 bits.",
        "Subtract a constant from x where x is made, or write the layer as Sub, Mul and Add.",
    ),
    "initial-statistics": Rule(
        "warning",
        "All means are 0 and all variances 1, as before any training.",
        "Export after training, or `batchnorm recalibrate`; if a scale alone is meant, write Mul and Add.",
    ),
    "dead-channels": Rule(
        "info or warning",
        "γ is 0, or 10⁶ times smaller than the layer's largest: the channel is constant (warning: all are).",
        "Prune the channels.",
    ),
    "momentum": Rule(
        "info or warning",
        "The momentum is below 0.5, while ONNX means the weight of the old value, 0.9 by default; "
        "0.1 is PyTorch's, the weight of the new one (warning: in training mode, where it is used).",
        "Set it to 1 − momentum.",
    ),
    "unfolded": Rule(
        "info",
        "The node could be folded into a neighbour, which leaves less to compute.",
        "`batchnorm fold` for linear neighbours, if the runtime does not fold by itself; others by hand.",
    ),
    "runtime": Rule(
        "warning",
        "A runtime that was tested refuses the opset, the IR version or the types of the node.",
        "Convert the model (`onnx.version_converter`), or give all parameters the type of x.",
    ),
    "shared-statistics": Rule(
        "info",
        "Nodes share a mean or a variance, though each sees data of its own.",
        "Nothing if they are one layer that is used twice and trained so; else `batchnorm recalibrate`.",
    ),
    "overridable": Rule(
        "warning",
        "A parameter is an input of the model too, so that a caller can replace it and nothing is folded.",
        "Remove the parameters from the inputs of the graph (from IR version 4 on they need not be there).",
    ),
    "unchecked": Rule(
        "info",
        "The parameters are not constants of the main graph, so they were not checked.",
        "Check what computes them; simplify the model if they are constant after all.",
    ),
}


class Finding(NamedTuple):
    """Something that `lint` found in a model.

    Attributes:
        name: The kind of finding, a key of the table in docs/lint.md.
        severity: "info", "warning" or "error".
        node: The name of the node, as `frozen_layers` names it; empty if the finding is about the model.
        message: What was found, with the values.
    """

    name: str
    severity: Severity
    node: str
    message: str

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return RULES[self.name].remedy
