"""What the figures come to: medians of runs, the best peer of each cell, and which goals are reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.rows import COMPARED, EQUAL, FLOOR, ROWS, STAND_INS, goals

BY_NAME = {row.name: row for row in ROWS}
CELLS = {row.name for row in COMPARED}
Line = dict[str, Any]


def of_runs(runs: Sequence[Line], read: Any) -> dict[str, float]:
    """The medians of what `read` gives of each run, by name."""
    return {name: statistics.median(read(run)[name] for run in runs) for name in read(runs[0])}


def merged(runs: Sequence[Line]) -> Line:
    """A line of whole runs, of tensors or special: times, and quotients of times that the same run took."""
    first = runs[0]
    line = first | {"ms": of_runs(runs, lambda run: run["ms"])}
    if "ratio" in first:
        known = [run["ratio"] for run in runs if run["ratio"] is not None]
        return line | {"ratio": statistics.median(known) if known else None}

    def over_ours(run: Line) -> dict[str, float]:
        return {name: ms / run["ms"]["ours"] for name, ms in run["ms"].items()}

    line["over_ours"] = of_runs(runs, over_ours)
    line["streaming_ms"] = statistics.median(run["streaming_ms"] for run in runs)
    line["streaming_over_ours"] = statistics.median(run["streaming_ms"] / run["ms"]["ours"] for run in runs)
    return line


def best_peer(line: Line, absent: Iterable[str]) -> dict[str, Any] | None:
    """The fastest peer of a line: measured, or as `STAND_INS` has it for an absent one."""
    found = [
        {"name": name, "ms": line["ms"][name], "over_ours": quotient}
        for name, quotient in line["over_ours"].items()
        if name not in ("ours", "floor")
    ]
    for name in absent:
        quotient = STAND_INS.get(name, {}).get((line["row"], line["pass"]))
        if quotient is not None:
            ms, over_ours = quotient * line["streaming_ms"], quotient * line["streaming_over_ours"]
            found.append({"name": f"{name}*", "ms": ms, "over_ours": over_ours})
    return min(found, key=lambda peer: peer["over_ours"], default=None)


def judged(line: Line, absent: Iterable[str]) -> Line:
    """The line with the goals that its row has, and what was reached."""
    best = line["best_peer"] = best_peer(line, absent)
    line["goals"] = []
    for goal in goals(BY_NAME[line["row"]], line["pass"]):
        if goal.against == FLOOR:
            ratio = 1 / line["over_ours"]["floor"]
        else:
            ratio = 1 / best["over_ours"] if best else None
        reached = None if ratio is None else ratio <= goal.limit
        line["goals"].append(goal._asdict() | {"ratio": ratio, "reached": reached})
    return line


def judged_special(record: Line) -> Line:
    """The record with whether its ratio is what it is to be; None without a ratio."""
    ratio, limit = record["ratio"], record["limit"]
    if ratio is None:
        return record | {"reached": None}
    return record | {"reached": ratio >= limit if record["at_least"] else ratio <= limit}


def behind(lines: Iterable[Line]) -> str | None:
    """Names every cell of the rows to compare whose best peer takes less than `EQUAL` of our time."""
    cells = [(f"{line['row']} {line['pass']}", line["best_peer"]) for line in lines if line["row"] in CELLS]
    known = [(cell, best) for cell, best in cells if best]
    if not known:
        return None
    slower = [
        f"{cell} {best['over_ours']:.3f} ({best['name']})"
        for cell, best in sorted(known, key=lambda item: item[1]["over_ours"])
        if best["over_ours"] < EQUAL
    ]
    equal = sum(EQUAL <= best["over_ours"] < 1 for _, best in known)
    return (
        f"best peer / ours is below {EQUAL:g} in {len(slower)} of {len(known)} cells"
        + (f": {', '.join(slower)}" if slower else "")
        + f"; in {equal} it is from {EQUAL:g} to below 1, which is called equal"
    )
