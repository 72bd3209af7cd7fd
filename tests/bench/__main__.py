"""Times us, the floor and the peers that are installed; `make bench`, or `python -m bench --help`.

The floor is what it costs to move the memory on the same threads: read x and write y, or for the backward
pass read dy and x and write dx; with ordinary or non-temporal stores, whichever is faster.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

import batchnorm as bn
from bench import peers, special, tables
from bench.case import TOLERANCE, Case
from bench.rows import DIRECTIONS, ROWS, Row
from bench.timing import medians

ROUNDS = 31


def measure(
    case: Case, direction: str, installed: dict[str, Any], rounds: int, exact: Any, told: Any
) -> dict[str, Any]:
    """One line: the median of each contender, and the error of each answer."""
    contenders = {"ours": case.ours()[direction]}
    for name, calls in installed.items():
        if direction in calls:
            contenders[name] = calls[direction]
    errors, wrong = {}, {}
    for name, call in contenders.items():
        answer = call()
        answer = getattr(call, "finished", lambda y: y)(answer)
        difference = case.difference(direction, answer)
        if difference > TOLERANCE[case.row.dtype]:
            wrong[name] = difference
        elif exact is not None:
            errors[name] = case.error(answer, exact)
        del answer  # JAX writes over it
    for name in wrong:
        del contenders[name]
    times = medians(contenders | case.floors(direction), rounds, told=told)
    floors = [times.pop(name) for name in ("floor, regular", "floor, streaming")]
    times["floor"] = min(floors)
    return {
        "row": case.row.name,
        "group": case.row.group,
        "pass": direction,
        "bytes": case.row.nbytes,
        "ms": {name: median.ms for name, median in times.items()},
        "streaming_ms": floors[1].ms,
        "rounds": {name: median.rounds for name, median in times.items()},
        "error_ulps": errors,
        "wrong_answers": wrong,
    }


def measure_row(
    row: Row, installed: dict[str, Any], args: argparse.Namespace, told: Any
) -> list[dict[str, Any]]:
    """The passes of a row that were asked for."""
    case = Case.of(row)
    case.answer_all()
    calls = {name: peer.calls(case, args.threads) for name, peer in installed.items()}
    exact = dict(case.exact())
    lines = []
    for direction in args.directions or DIRECTIONS:

        def tell(contender: str, what: str = f"{row.name} {direction}") -> None:
            told(f"{what}: {contender}")

        lines.append(measure(case, direction, calls, args.rounds, exact.get(direction), tell))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only rows whose name or group contains this: 56x56, float16, baseline, overhead, …",
    )
    parser.add_argument(
        "--pass",
        dest="directions",
        action="append",
        choices=DIRECTIONS,
        help="only this pass; may be given again",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads for us and for every peer (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-output"),
        help="where JSON, table and plot go (default %(default)s)",
    )
    args = parser.parse_args()

    processors = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(processors) < args.threads:
        parser.error(f"--threads {args.threads}: only {len(processors)} processors")
    os.sched_setaffinity(0, processors)  # what keeps every peer to that many threads
    bn.set_num_threads(args.threads)

    rows = [row for row in ROWS if args.only in f"{row.group}, {row.name}"]
    others = [measurement for measurement in special.ALL if args.only in measurement.group]
    if not rows and not others:
        parser.error(f"--only {args.only}: no such row")
    installed, absent = peers.installed()
    console = Console(width=None if sys.stdout.isatty() else 150)
    results: dict[str, Any] = {
        "machine": {
            "processor": tables.processor(),
            "system": platform.platform(),
            "threads": args.threads,
            "simd": bn.simd_level(),
        },
        "versions": {
            "batchnorm": bn.__version__,
            **{name: peer.version() for name, peer in installed.items()},
        },
        "absent": absent,
        "rows": [],
        "special": [],
    }
    columns = ("{task.description}", MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(rows) + len(others))

        def told(what: str) -> None:
            progress.update(task, description=what)

        for row in rows:
            results["rows"] += measure_row(row, installed, args, told)
            progress.advance(task)
        for measurement in others:
            results["special"] += measurement.run(args.rounds, args.threads, told)
            progress.advance(task)
    return tables.report(results, args.output, console)


if __name__ == "__main__":
    sys.exit(main())
