"""Fails where we are far from the goals over the floor of a copy, or behind NumPy; `make bench-check`.

A handful of rows, each measured three times: it fails only where the median of the three is above twice the
goal, or above NumPy's time, and is so again ten seconds later, so that other work on the machine does not
decide.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

import batchnorm as bn
from bench.case import Case
from bench.peers import numpy
from bench.rows import BASELINE, DIRECTIONS, FLOOR, OTHER_DTYPES, goals
from bench.timing import medians

# One of each family beyond the caches, and a narrow dtype: rows that have goals over the floor. Then what
# caches hold, where NumPy is nearest.
ROWS = (BASELINE[1], BASELINE[5], OTHER_DTYPES[0], BASELINE[3], BASELINE[7])
NUMPY = "NumPy"
RUNS, ROUNDS, SLACK = 3, 5, 2
PAUSE = 10.0  # seconds


class Verdict(NamedTuple):
    """What our time is compared with, the ratios run by run, and what their median must not be above."""

    against: str
    ratios: list[float]
    limit: float

    @property
    def passes(self) -> bool:
        return statistics.median(self.ratios) <= self.limit


def verdicts(runs: list[dict[str, float]], limits: list[float]) -> list[Verdict]:
    """Of milliseconds by contender, run by run, and the goals over the floor."""

    def over(names: set[str]) -> list[float]:
        return [run["ours"] / min(run[name] for name in names) for run in runs]

    seen = set(runs[0]) - {"ours", NUMPY}
    made = [Verdict(FLOOR, over(seen), SLACK * limit) for limit in limits]
    return made + ([Verdict(NUMPY, over({NUMPY}), 1.0)] if NUMPY in runs[0] else [])


def measured(case: Case, direction: str, theirs: dict[str, object]) -> list[dict[str, float]]:
    """Milliseconds of us, of NumPy if it has the pass, and of the copies, run by run."""
    calls = {"ours": case.ours()[direction], **case.floors(direction)}
    if direction in theirs:
        calls[NUMPY] = theirs[direction]
    return [{name: m.ms for name, m in medians(calls, ROUNDS).items()} for _ in range(RUNS)]


def judged(measure: Callable[[], list[dict[str, float]]], limits: list[float]) -> list[Verdict]:
    """The verdicts of a pass. One that does not pass is measured once more, when other work may be over."""
    made = verdicts(measure(), limits)
    if all(verdict.passes for verdict in made):
        return made
    time.sleep(PAUSE)
    return verdicts(measure(), limits)


def main() -> int:
    table = Table("tensor", "pass", "over", "ours", "fails above", "")
    failed = 0
    for row in ROWS:
        case = Case.of(row)
        theirs = numpy.calls(case, bn.get_num_threads())
        for direction in DIRECTIONS:
            limits = [goal.limit for goal in goals(row, direction) if goal.against == FLOOR]
            measure = functools.partial(measured, case, direction, theirs)
            for verdict in judged(measure, limits):
                failed += not verdict.passes
                text = ", ".join(f"{ratio:.2f}" for ratio in verdict.ratios)
                mark = "passes" if verdict.passes else "FAILS"
                table.add_row(row.name, direction, verdict.against, text, f"{verdict.limit:.2f}", mark)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(
        f"{table.row_count} ratios, {bn.get_num_threads()} threads, {bn.simd_level()}; {failed} failed"
    )
    return 1 if failed or not table.row_count else 0


if __name__ == "__main__":
    sys.exit(main())
