"""The shift of a layer's inputs: of live data from a reference (`shift`), and during training (`ShiftTrace`).

Internal covariate shift is what batch normalization was proposed against (Ioffe and Szegedy 2015, arXiv
1502.03167, sections 1 and 4.1, Figure 1). Plots and Parquet files need the extra `batchnorm[shift]`.
"""

from __future__ import annotations

from batchnorm.shift.measures import Shift, Summary, shift
from batchnorm.shift.trace import PERCENTILES, ShiftTrace

__all__ = ["PERCENTILES", "Shift", "ShiftTrace", "Summary", "shift"]
