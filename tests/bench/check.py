"""Fails where we are far from the goals over the floor of a copy; `make bench-check`.

A handful of rows, each measured three times: it fails only where the median of the three is above three times
the goal, so that other work on the machine does not decide.
"""

from __future__ import annotations

import statistics
import sys

from rich.console import Console
from rich.table import Table

import batchnorm as bn
from bench.case import Case
from bench.rows import BASELINE, DIRECTIONS, FLOOR, OTHER_DTYPES, goals
from bench.timing import medians

# One of each family beyond the caches, and a narrow dtype: the rows whose goals are over the floor.
ROWS = (BASELINE[1], BASELINE[5], OTHER_DTYPES[0])
RUNS, ROUNDS, SLACK = 3, 5, 3


def ratios(case: Case, direction: str) -> list[float]:
    """Our time over the floor, run by run."""
    calls = {"ours": case.ours()[direction], **case.floors(direction)}
    runs = [medians(calls, ROUNDS) for _ in range(RUNS)]
    return [run["ours"].ms / min(run[name].ms for name in run if name != "ours") for run in runs]


def main() -> int:
    table = Table("tensor", "pass", "ours / floor", "goal", f"fails above {SLACK} x goal")
    failed = 0
    for row in ROWS:
        case = Case.of(row)
        for direction in DIRECTIONS:
            limits = [goal.limit for goal in goals(row, direction) if goal.against == FLOOR]
            for limit in limits:
                seen = ratios(case, direction)
                ratio = statistics.median(seen)
                ok = ratio <= SLACK * limit
                failed += not ok
                text = ", ".join(f"{r:.2f}" for r in seen)
                table.add_row(row.name, direction, text, f"{limit:.2f}", "passes" if ok else "FAILS")
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(
        f"{table.row_count} ratios, {bn.get_num_threads()} threads, {bn.simd_level()}; {failed} failed"
    )
    return 1 if failed or not table.row_count else 0


if __name__ == "__main__":
    sys.exit(main())
