"""Times networks of torchvision with PyTorch's batch norm layers and with ours; `make bench-network`."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import version
from typing import Any

from rich.console import Console

import batchnorm as bn
from bench.tables import processor
from bench_network import tables
from bench_network.arguments import arguments
from bench_network.measure import DifferentError, measure
from bench_network.memory import peak
from bench_network.rows import EAGER


def main() -> int:
    args = arguments()
    os.sched_setaffinity(0, args.processors)
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
    variants = {row: row.variants(args.asked) for row in args.rows}
    start, done, wanted = time.monotonic(), 0, sum(row.takes(names) for row, names in variants.items())

    def say(what: str) -> None:
        print(f"{(time.monotonic() - start) / 60:5.1f} min  {what}", file=sys.stderr, flush=True)

    say(f"{len(args.rows)} rows; on two quiet cores, 15 rounds of them take about {wanted / 60:.0f} min")
    if args.stays:
        say(f"the page stays as it is, since {args.stays}")
    for row, names in variants.items():

        def told(what: str, name: str = row.name) -> None:
            say(f"{name}: {what}")

        try:
            lines = measure(row, names, args.rounds, args.threads, told)
        except DifferentError as error:
            print(error, file=sys.stderr)
            return 1
        told("peak memory")
        peaks = {name: peak(row, name, args.threads) for name in EAGER if name in names}
        lines[0]["peak_mib"] = {name: mib for name, mib in peaks.items() if mib is not None}
        results["rows"] += lines
        done += row.takes(names)
        left = (time.monotonic() - start) / done * (wanted - done)
        told(f"done; about {left / 60:.0f} min are left")
    return tables.report(results, args.output, args.page, Console(width=None if sys.stdout.isatty() else 150))


if __name__ == "__main__":
    sys.exit(main())
