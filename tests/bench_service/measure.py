"""A run: servers are started, their answers checked, and rounds of load interleaved."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_service import load
from bench_service.environments import AbsentError
from bench_service.messages import check, message
from bench_service.rows import OURS, Row
from bench_service.servers import Workspace, running


def start(
    names: Iterable[str], space: Workspace, stack: ExitStack, told: Callable[[str], object]
) -> tuple[dict[str, int], dict[str, str]]:
    """Start the servers; gives the ports of those that run, and why the others do not."""
    ports, absent = {}, {}
    for name in names:
        told(f"starting {name}")
        try:
            ports[name] = stack.enter_context(running(name, space))
        except AbsentError as reason:
            if name == OURS:
                raise
            absent[name] = str(reason)
    return ports, absent


def measure(
    row: Row,
    ports: dict[str, int],
    space: Workspace,
    rounds: int,
    seconds: int,
    told: Callable[[str], object],
) -> dict[str, Any]:
    """One row: the medians of every server whose answer is right, in another order each round."""
    sent = message(row, space.key)
    script = load.write_script(Path(space.directory, f"{row.name}.lua"), sent)
    contenders = [name for name in (OURS, *row.peers) if name in ports]
    failing, sizes = {}, {}
    for name in contenders:
        checked = check(ports[name], name, row, sent)
        sizes[name] = checked.body_bytes
        if checked.wrong is not None:
            failing[name] = checked.wrong
    runs: dict[str, list[load.Run]] = {name: [] for name in contenders if name not in failing}
    order, shuffled = list(runs), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            told(f"{row.name}: {name}")
            if name not in failing:
                run = load.run(ports[name], script, row.connections, seconds, sizes[name])
                runs[name].append(run)
                if run.failure is not None:
                    failing[name] = run.failure
    return {
        "row": row.name,
        "figures": {
            name: {
                "requests/s": statistics.median(run.rate for run in done),
                "p50": statistics.median(run.p50 for run in done),
                "p99": statistics.median(run.p99 for run in done),
                "rounds": [run._asdict() for run in done],
            }
            for name, done in runs.items()
            if name not in failing
        },
        "failing": failing,
    }
