"""Times networks of torchvision with PyTorch's batch norm layers and with ours; `make bench-network`.

The variants of a network are compared, then timed in turn: PyTorch's, compiled by torch.compile, ours, ours
fused, ours fused and compiled, and the rest, which is the network without batch norm, ReLU and additions.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import batchnorm as bn
from bench.tables import processor
from bench_network import tables
from bench_network.measure import DifferentError, measure
from bench_network.memory import peak
from bench_network.rows import EAGER, PYTORCH, QUICK, REST, ROWS, VARIANTS

ROUNDS = 15


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_network", description=__doc__)
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only rows whose name contains this: resnet18, channels-last",
    )
    parser.add_argument(
        "--variant",
        dest="variants",
        action="append",
        choices=[name for name in VARIANTS if name not in (PYTORCH, REST)],
        help="only this variant beside PyTorch's and the rest; may be given again",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only try the harness")
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
        help="a page to put the tables in, if all rows are timed, in rounds enough",
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    args.rows = [row for row in (QUICK if args.quick else ROWS) if args.only in row.name]
    if not args.rows:
        parser.error(f"--only {args.only}: no such row")
    args.processors = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(args.processors) < args.threads:
        parser.error(f"--threads {args.threads}: only {len(args.processors)} processors")
    asked = args.variants or VARIANTS
    args.variants = tuple(name for name in VARIANTS if name in (PYTORCH, REST, *asked))
    if args.rows != ROWS or args.rounds < ROUNDS:
        args.page = None
    return args


def main() -> int:
    args = arguments()
    os.sched_setaffinity(0, args.processors)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": {
            "processor": processor(),
            "system": platform.platform(),
            "threads": args.threads,
            "simd": bn.simd_level(),
        },
        "versions": {
            "batchnorm": bn.__version__,
            **{name: version(name) for name in ("torch", "torchvision")},
        },
        "how": {"rounds": args.rounds, "quick": args.quick},
        "rows": [],
    }
    start, done, wanted = time.monotonic(), 0, sum(row.seconds for row in args.rows)

    def say(what: str) -> None:
        print(f"{(time.monotonic() - start) / 60:5.1f} min  {what}", file=sys.stderr, flush=True)

    say(f"{len(args.rows)} rows; on two quiet cores, 15 rounds of them take about {wanted / 60:.0f} min")
    for row in args.rows:

        def told(what: str, name: str = row.name) -> None:
            say(f"{name}: {what}")

        try:
            lines = measure(row, args.variants, args.rounds, told)
        except DifferentError as error:
            print(error, file=sys.stderr)
            return 1
        told("peak memory")
        peaks = {name: peak(row, name, args.threads) for name in EAGER if name in args.variants}
        lines[0]["peak_mib"] = {name: mib for name, mib in peaks.items() if mib is not None}
        results["rows"] += lines
        torch.compiler.reset()
        done += row.seconds
        left = (time.monotonic() - start) / done * (wanted - done)
        told(f"done; about {left / 60:.0f} min are left")
    return tables.report(results, args.output, args.page, Console(width=None if sys.stdout.isatty() else 150))


if __name__ == "__main__":
    sys.exit(main())
