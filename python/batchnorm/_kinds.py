"""The kinds of frozen layer, for what works with any of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeAlias

from batchnorm._file import BATCH_NORM, WHITENING, Kind, read
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.frozen_whitening import FrozenWhitening

AnyFrozen: TypeAlias = FrozenBatchNorm | FrozenWhitening

MAKERS: Mapping[Kind, Callable[..., AnyFrozen]] = {BATCH_NORM: FrozenBatchNorm, WHITENING: FrozenWhitening}
"""The class of each kind."""


def load(path: str | os.PathLike[str]) -> AnyFrozen:
    """Load the layer saved at `path`, of either kind, and verify its fingerprint.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a frozen layer, is of an unknown version, or is damaged.
    """
    return read(path, MAKERS)
