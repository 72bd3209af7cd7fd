"""What is timed, and what is to be reached: data alone."""

from __future__ import annotations

import re
from typing import NamedTuple

STEP, EVAL = PASSES = ("step", "eval")
CONTIGUOUS, CHANNELS_LAST = MEMORY = ("contiguous", "channels-last")

PYTORCH, COMPILED = "PyTorch", "PyTorch compiled"
OURS, FUSED, FUSED_COMPILED = "ours", "ours fused", "ours fused compiled"
REST = "rest"
VARIANTS = (PYTORCH, COMPILED, OURS, FUSED, FUSED_COMPILED, REST)
EAGER = (PYTORCH, OURS, FUSED)
COMPILING = (COMPILED, FUSED_COMPILED)
ROUNDS = 15

# The operators that the profiler's times are summed over.
OPERATORS = {
    "batch norm": re.compile("batch_?norm", re.IGNORECASE),
    "ReLU": re.compile("relu|threshold|hardtanh|clamp", re.IGNORECASE),
    "addition": re.compile(r"^aten::add_?$"),
}


class Row(NamedTuple):
    """A network of torchvision, the batch and image that it is given, and the memory format of both."""

    network: str
    batch: int
    image: int
    memory: str = CONTIGUOUS
    compiled: bool = False  # whether a whole run has its compiled variants too
    seconds: int = 30  # that the variants of `EAGER` and the rest take, about: 15 rounds on two cores
    compiling: int = 150  # that the compiled variants take beside these

    @property
    def name(self) -> str:
        """As tables and `--only` name it."""
        return f"{self.network} {self.batch}x3x{self.image}x{self.image} {self.memory}"

    def variants(self, asked: tuple[str, ...] | None) -> tuple[str, ...]:
        """The variants that are asked for, or those of a whole run, beside PyTorch's and the rest."""
        if asked is None:
            asked = VARIANTS if self.compiled else EAGER
        return tuple(name for name in VARIANTS if name in (PYTORCH, REST, *asked))

    def takes(self, names: tuple[str, ...]) -> int:
        """Seconds that measuring these variants takes, about."""
        return self.seconds + (self.compiling if set(COMPILING) & set(names) else 0)


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
        Goal(ADDED, OURS, PYTORCH, 0.65),
        Goal(ADDED, FUSED, PYTORCH, 0.45),
        Goal(MEMORY_PEAK, FUSED, PYTORCH, 1.02),
    ]


# Networks, batches and images that take a third of a second to a second a step on two cores; then the
# seconds of a row, without the compiled variants and of these.
SIZES = (
    ("resnet18", 8, 128, 105, 135),
    ("resnet50", 8, 128, 190, 345),
    ("densenet121", 8, 96, 170, 515),
    ("mobilenet_v2", 16, 128, 105, 230),
)
# Compiling takes longer than all rounds, so a whole run does it for two networks, one in each memory format:
# one with additions and ReLU, one with many small batch norms and ReLU6.
COMPILED_ROWS = {("resnet50", CONTIGUOUS), ("mobilenet_v2", CHANNELS_LAST)}
ROWS = [
    Row(network, batch, image, memory, (network, memory) in COMPILED_ROWS, seconds, compiling)
    for network, batch, image, seconds, compiling in SIZES
    for memory in MEMORY
]
# The same networks, so small that only the harness is tried.
QUICK = [row._replace(batch=2, image=64, seconds=45) for row in ROWS]
