"""What is timed, and what is to be reached: data alone."""

from __future__ import annotations

from typing import NamedTuple

STEP, EVAL = PASSES = ("step", "eval")
CONTIGUOUS, CHANNELS_LAST = MEMORY = ("contiguous", "channels-last")

PYTORCH, COMPILED = "PyTorch", "PyTorch compiled"
OURS, FUSED, FUSED_COMPILED = "ours", "ours fused", "ours fused compiled"
REST = "rest"
VARIANTS = (PYTORCH, COMPILED, OURS, FUSED, FUSED_COMPILED, REST)
EAGER = (PYTORCH, OURS, FUSED)


class Row(NamedTuple):
    """A network of torchvision, the batch and image that it is given, and the memory format of both."""

    network: str
    batch: int
    image: int
    memory: str = CONTIGUOUS
    seconds: int = 30  # that measuring it takes, about: 15 rounds on two cores, with compiling

    @property
    def name(self) -> str:
        """As tables and `--only` name it."""
        return f"{self.network} {self.batch}x3x{self.image}x{self.image} {self.memory}"


class Goal(NamedTuple):
    """A limit of the time of `variant`, or of what it adds to the rest, over the same of `against`."""

    what: str
    variant: str
    against: str
    limit: float


WHOLE, ADDED, MEMORY_PEAK = "time", "added to the rest", "peak memory"


def goals(direction: str) -> list[Goal]:
    """The goals of each pass."""
    never_slower = [
        Goal(WHOLE, variant, against, 1.02)
        for variant, against in ((OURS, PYTORCH), (FUSED, PYTORCH), (FUSED_COMPILED, COMPILED))
    ]
    if direction == EVAL:
        return never_slower
    return [
        *never_slower,
        Goal(ADDED, OURS, PYTORCH, 0.85),
        Goal(ADDED, FUSED, PYTORCH, 0.6),
        Goal(MEMORY_PEAK, FUSED, PYTORCH, 1.02),
    ]


# Sizes that take a third of a second to a second a step on two cores.
SIZES = (
    ("resnet18", 16, 128, 270),
    ("resnet50", 8, 128, 480),
    ("densenet121", 8, 96, 620),
    ("mobilenet_v2", 16, 128, 300),
)
ROWS = [Row(*size, memory, seconds) for *size, seconds in SIZES for memory in MEMORY]
# The same networks, so small that only the harness is tried.
QUICK = [Row(network, 2, 64, memory) for network, *_ in SIZES for memory in MEMORY]
