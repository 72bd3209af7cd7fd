"""Scale and shift of each model, float32, as the peers compute with them."""

from __future__ import annotations

import os

import numpy as np


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (scale, shift) by the name of the model; `BENCH_AFFINE` names the file."""
    with np.load(os.environ["BENCH_AFFINE"]) as file:
        names = {key.rpartition(".")[0] for key in file.files}
        return {name: (file[f"{name}.scale"], file[f"{name}.shift"]) for name in names}
