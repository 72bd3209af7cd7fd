"""The arguments of a run, and whether it may write the page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench_network.rows import EAGER, PYTORCH, QUICK, REST, ROUNDS, ROWS, VARIANTS, Row

DESCRIPTION = """Times networks of torchvision with PyTorch's batch norm layers and with ours.
The variants of a network are compared, then timed in turn: PyTorch's, compiled by torch.compile, ours, ours
fused, ours fused and compiled, and the rest, which is the network without batch norm, ReLU and additions."""


def stays(rows: list[Row], rounds: int, asked: tuple[str, ...] | None) -> str | None:
    """Why a run must leave the page as it is; None if the page may show it."""
    if rows != ROWS:
        return "not all rows are timed"
    if rounds < ROUNDS:
        return f"there are fewer than {ROUNDS} rounds"
    if asked is not None and {PYTORCH, REST, *asked} not in ({*VARIANTS}, {*EAGER, REST}):
        return "neither all variants are timed, nor all of those that are not compiled"
    return None


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What a run does; `page` is left only if the run may write it, and `stays` says why not."""
    parser = argparse.ArgumentParser(prog="bench_network", description=DESCRIPTION)
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only rows whose name contains this: resnet18, channels-last",
    )
    parser.add_argument(
        "--variant",
        dest="asked",
        action="append",
        choices=[name for name in VARIANTS if name not in (PYTORCH, REST)],
        help="only this variant beside PyTorch's and the rest, in every row; may be given again",
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
        help="a page to put the tables in, if all rows are timed, with a set of variants that it may show",
    )
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    args.rows = [row for row in (QUICK if args.quick else ROWS) if args.only in row.name]
    if not args.rows:
        parser.error(f"--only {args.only}: no such row")
    args.processors = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(args.processors) < args.threads:
        parser.error(f"--threads {args.threads}: only {len(args.processors)} processors")
    args.asked = None if args.asked is None else tuple(args.asked)
    args.stays = stays(args.rows, args.rounds, args.asked) if args.page else None
    if args.stays:
        args.page = None
    return args
