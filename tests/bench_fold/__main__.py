"""Times networks in ONNX Runtime before and after folding; `make bench-fold`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

from batchnorm.onnx import fold
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.nodes import operator_name
from batchnorm.onnx.runtime import open_session
from bench.page import put_in
from bench.tables import DEFAULT_THREADS, markdown, processor
from bench.timing import medians
from onnx_models import NORMALIZATIONS, real_graph

MARK = "<!-- printed by `make bench-fold` -->\n"
ROUNDS = 30
REST = 0.2  # seconds: threads of a session spin for a while after a call, and would slow the next one
LEVELS = {"off": False, "on": True}  # of ONNX Runtime's optimizations
KINDS = ("as it is", "again", "folded")  # again: the same model in another session, which tells the noise
HEADS = [
    "network",
    "folded",
    "optimizations",
    "left",
    "same nodes",
    *(f"{kind}, ms" for kind in KINDS),
    "gain",
]


class Call:
    """A run of a session, as `bench.timing` times it, after one that wakes its threads."""

    def __init__(self, session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> None:
        self.session, self.feeds = session, feeds

    def __call__(self) -> None:
        self.session.run(None, self.feeds)

    def timed(self, number: int) -> float:
        """Seconds of a run, of `number` in a row."""
        self()
        start = time.perf_counter()
        for _ in range(number):
            self()
        return (time.perf_counter() - start) / number


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What a run does; `page` is left only if the run is whole."""
    parser = argparse.ArgumentParser(prog="bench_fold", description=__doc__)
    parser.add_argument("--only", choices=NORMALIZATIONS, help="one of the networks")
    for name, default in (("rounds", ROUNDS), ("threads", DEFAULT_THREADS)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{name} (default %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-output"),
        help="where JSON and tables go (default %(default)s)",
    )
    parser.add_argument(
        "page",
        nargs="?",
        type=Path,
        help="a page to put the tables in, if all is timed with the default settings",
    )
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    args.processors = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(args.processors) < args.threads:
        parser.error(f"--threads {args.threads}: only {len(args.processors)} processors")
    if args.only or args.rounds < ROUNDS or args.threads != DEFAULT_THREADS:
        args.page = None
    return args


def measure(name: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Time one network, as it is and folded, with ONNX Runtime's optimizations off and on."""
    model = real_graph(name)
    folded, report = fold(model)
    (feed,) = Graph(model).inputs
    feeds = {feed: np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}
    lines = []
    for level, optimize in LEVELS.items():
        calls = {}
        for kind in KINDS:
            graph = Graph(folded if kind == "folded" else model)
            session = open_session(graph, optimize=optimize, threads=threads)
            calls[kind] = Call(session, feeds)
        times = medians(calls, rounds, rest=REST)
        lines.append(
            {
                "network": name,
                "folded": report.folded,
                "normalizations": len(report.nodes),
                "optimizations": level,
                "left": nodes_run(model, optimize)["BatchNormalization"],
                "same": nodes_run(model, optimize) == nodes_run(folded, optimize),
                "ms": {kind: median.ms for kind, median in times.items()},
                "rounds": {kind: median.rounds for kind, median in times.items()},
            }
        )
    return lines


def nodes_run(model: onnx.ModelProto, optimize: bool) -> Counter[str]:
    """How many nodes of each operator ONNX Runtime runs, after its optimizations if they are on."""
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = 3  # it warns that a model saved so is for this machine only
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "model.onnx"))
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    return Counter(operator_name(node) for node in optimized.graph.node)


def cells(line: dict[str, Any]) -> list[str]:
    ms = line["ms"]
    return [
        line["network"],
        f"{line['folded']} of {line['normalizations']}",
        line["optimizations"],
        str(line["left"]),
        "yes" if line["same"] else "no",
        *(f"{ms[kind]:.1f}" for kind in KINDS),
        f"{ms['as it is'] / ms['folded']:.2f} ×",
    ]


def main() -> int:
    args = arguments()
    os.sched_setaffinity(0, args.processors)
    start = time.monotonic()
    lines = []
    for name in [args.only] if args.only else NORMALIZATIONS:
        print(f"{time.monotonic() - start:5.0f} s  {name}", file=sys.stderr, flush=True)
        lines += measure(name, args.rounds, args.threads)
    machine = {"processor": processor(), "system": platform.platform(), "threads": args.threads}
    versions = {name: version(name) for name in ("batchnorm", "onnx", "onnxruntime")}
    notes = [
        f"{machine['processor']}, {args.threads} thread{'s' * (args.threads > 1)}; one image of 224 × 224, "
        f"float32; medians of {args.rounds} interleaved rounds",
        "versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]
    table = Table(*HEADS)
    for line in lines:
        table.add_row(*cells(line))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print("\n".join(notes), highlight=False, markup=False)
    text = "\n".join(f"{note}.\n" for note in notes) + "\n" + markdown(HEADS, [cells(line) for line in lines])
    args.output.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine, "versions": versions, "lines": lines}
    (args.output / "bench-fold.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "bench-fold.md").write_text(text)
    written = f"{args.output}/bench-fold.json, bench-fold.md"
    if args.page:
        put_in(args.page, MARK, text)
        written += f"; {args.page}"
    console.print(f"written: {written}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
