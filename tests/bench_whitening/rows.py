"""What is timed, and what is to be reached: data alone."""

from __future__ import annotations

from typing import get_args

from batchnorm.whitening import Method

BATCH_NORM = "batch norm"
METHODS: tuple[Method, ...] = get_args(Method)
CONTENDERS = (BATCH_NORM, *METHODS)
FORWARD, BACKWARD = PASSES = ("forward", "backward")

# The same number of positions for every D, twice the largest: an example of 64×64 pixels, or 64 of 8×8.
POSITIONS = 4096
SIZES = tuple(2**k for k in range(4, 12))
EPS = 1e-5
ROUNDS = 15
# Of one pass of one contender. So a whole run takes about eight minutes on two cores.
BUDGET = 5.0  # seconds

# Against other libraries: float64, with so many rows for each channel, and ours no slower.
COMPARED = (64, 256, 1024)
ROWS_PER_CHANNEL = 16
LIMIT = 1.0
# Before each timing: the threads of OpenBLAS (NumPy, scikit-learn) spin for a while after a call.
# After 30 ms of rest our small batches took four times as long as after this.
REST = 0.3  # seconds
