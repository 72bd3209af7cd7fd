"""Times whitening by each method beside batch norm, then against other libraries; `make bench-whitening`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from threadpoolctl import threadpool_limits

import batchnorm as bn
from bench.tables import DEFAULT_THREADS, processor
from bench_whitening import costs, peers, tables
from bench_whitening.rows import COMPARED, ROUNDS, SIZES


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What a run does; `page` is left only if the run is whole."""
    parser = argparse.ArgumentParser(prog="bench_whitening", description=__doc__)
    parser.add_argument("--most", type=int, default=max(SIZES), help="most channels (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=DEFAULT_THREADS, help="threads (default %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-output"),
        help="where JSON, tables and plot go (default %(default)s)",
    )
    parser.add_argument(
        "page",
        nargs="?",
        type=Path,
        help="a page to put the tables in, and the plot beside it, if all is timed with the default settings",
    )
    args = parser.parse_args(given)
    if args.rounds < 1 or args.most < min(SIZES):
        parser.error(f"--rounds is at least 1, --most at least {min(SIZES)}")
    args.processors = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(args.processors) < args.threads:
        parser.error(f"--threads {args.threads}: only {len(args.processors)} processors")
    whole = args.most >= max(SIZES) and args.rounds >= ROUNDS and args.threads == DEFAULT_THREADS
    if not whole:
        args.page = None
    return args


def main() -> int:
    args = arguments()
    os.sched_setaffinity(0, args.processors)
    bn.set_num_threads(args.threads)
    start = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {what}", file=sys.stderr, flush=True)

    results: dict[str, Any] = {
        "machine": {
            "processor": processor(),
            "system": platform.platform(),
            "threads": args.threads,
            "simd": bn.simd_level(),
        },
        "versions": {
            "batchnorm": bn.__version__,
            **{name: version(name) for name in ("numpy", "scikit-learn")},
        },
        "how": {"rounds": args.rounds},
        "costs": [],
        "peers": [],
    }
    with threadpool_limits(args.threads):
        for size in COMPARED:
            if size <= args.most:
                try:
                    results["peers"] += peers.compare(size, args.rounds, told)
                except peers.DifferentError as error:
                    print(error, file=sys.stderr)
                    return 1
    for size in SIZES:
        if size <= args.most:
            results["costs"] += costs.measure(size, args.rounds, args.threads, told)
    tables.report(results, args.output, args.page, Console(width=None if sys.stdout.isatty() else 150))
    return 0


if __name__ == "__main__":
    sys.exit(main())
