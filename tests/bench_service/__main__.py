"""Times the service and other servers by their answers over HTTP; `make bench-service`.

One process each, on loopback ports of this machine, all in one run: rounds of wrk interleaved. Every server
is sent the same bytes, and an answer is checked before it is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from bench_service import load, tables
from bench_service.environments import HERE
from bench_service.measure import measure, start
from bench_service.rows import OURS, ROWS
from bench_service.servers import COMMANDS, Workspace


def versions() -> dict[str, str]:
    """The versions that are measured; of peers in environments of their own, those that are pinned."""
    found = {name: version(name) for name in ("batchnorm-service", "fastapi", "uvicorn", "orjson", "numpy")}
    for name in ("mlserver", "nvidia-pytriton"):
        for file in HERE.glob("requirements-*.txt"):
            pins = dict(line.split("==") for line in file.read_text().split())
            found |= {name: pins[name]} if name in pins else {}
    return {"Python": platform.python_version(), **found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench_service", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only rows whose name contains this: JSON, 64x4096, …"
    )
    parser.add_argument(
        "--peer",
        dest="peers",
        action="append",
        choices=[name for name in COMMANDS if name != OURS],
        help="only this peer; may be given again",
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default %(default)s)")
    parser.add_argument(
        "--seconds", type=int, default=2, help="of each server in each round (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-output"),
        help="where JSON, table and plot go (default %(default)s)",
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.seconds < 1:
        parser.error("--rounds and --seconds are at least 1")
    if not load.installed():
        print(load.MISSING, file=sys.stderr)
        return 1
    rows = [row for row in ROWS if args.only in row.name]
    if args.peers:
        rows = [row._replace(peers=tuple(p for p in row.peers if p in args.peers)) for row in rows]
        rows = [row for row in rows if row.peers]
    if not rows:
        parser.error("no such row")
    names = [name for name in COMMANDS if name == OURS or any(name in row.peers for row in rows)]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped then too
    console = Console(width=None if sys.stdout.isatty() else 150)
    results: dict[str, Any] = {
        "machine": {
            "processor": tables.processor(),
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
        },
        "how": {"rounds": args.rounds, "seconds": args.seconds},
        "versions": versions(),
        "rows": [],
    }
    columns = ("{task.description}", MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="bench-service-") as directory,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ExitStack() as stack,
    ):
        task = progress.add_task("", total=len(rows))

        def told(what: str) -> None:
            progress.update(task, description=what)

        space = Workspace(Path(directory))
        ports, results["absent"] = start(names, space, stack, told)
        for row in rows:
            results["rows"].append(measure(row, ports, space, args.rounds, args.seconds, told))
            progress.advance(task)
    return tables.report(results, args.output, console)


if __name__ == "__main__":
    sys.exit(main())
