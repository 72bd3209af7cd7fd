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
from bench.verdicts import merged

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


def arguments() -> argparse.Namespace:
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
        "--threads",
        type=int,
        default=tables.DEFAULT_THREADS,
        help="threads for us and for every peer (default %(default)s)",
    )
    parser.add_argument(
        "--runs", type=int, default=1, help="whole runs, whose medians are shown (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-output"),
        help="where JSON, table and plot go (default %(default)s)",
    )
    parser.add_argument(
        "page",
        nargs="?",
        type=Path,
        help="a page to put the tables in, if it has a place for so many threads and all is timed",
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.runs < 1:
        parser.error("--rounds and --runs are at least 1")
    args.processors = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(args.processors) < args.threads:
        parser.error(f"--threads {args.threads}: only {len(args.processors)} processors")
    args.rows = [row for row in ROWS if args.only in f"{row.group}, {row.name}"]
    args.others = [measurement for measurement in special.ALL if args.only in measurement.group]
    if not args.rows and not args.others:
        parser.error(f"--only {args.only}: no such row")
    whole = not args.only and not args.directions and args.rounds >= ROUNDS
    if args.page and not (whole and tables.page_mark(args.threads) in args.page.read_text()):
        args.page = None
    return args


def run(args: argparse.Namespace, installed: dict[str, Any], told: Any, done: Any) -> tuple[Any, Any]:
    """The lines and the special records of one whole run."""
    lines, records = [], []
    for row in args.rows:
        lines += measure_row(row, installed, args, told)
        done()
    for measurement in args.others:
        records += measurement.run(special.Setting(args.rounds, args.threads, installed, told))
        done()
    return lines, records


def main() -> int:
    args = arguments()
    os.sched_setaffinity(0, args.processors)  # what keeps every peer to that many threads
    bn.set_num_threads(args.threads)
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
        "how": {"rounds": args.rounds, "runs": args.runs},
    }
    parts = args.runs * (len(args.rows) + len(args.others))
    columns = ("{task.description}", MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=parts)

        def told(what: str) -> None:
            progress.update(task, description=what)

        runs = [run(args, installed, told, lambda: progress.advance(task)) for _ in range(args.runs)]
    results["rows"], results["special"] = (
        [merged(lines) for lines in zip(*of, strict=True)] for of in zip(*runs, strict=True)
    )
    return tables.report(results, args.output, args.page, console)


if __name__ == "__main__":
    sys.exit(main())
