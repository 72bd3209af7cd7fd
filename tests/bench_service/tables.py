"""The table, the JSON and the plot of a run."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench_service.rows import OURS, P50, P99, RATE, ROUTE, ROWS, TRITON, TRITON_OVER_ROUTE

BY_NAME = {row.name: row for row in ROWS}
HEADS = ["request", "server", "requests/s", "p50, ms", "p99, ms", "ours / it", "goal: reached"]


def processor() -> str:
    """What the system calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def add_stand_in(line: dict[str, Any], absent: dict[str, str]) -> None:
    """Where Triton is absent, put the plain route's rate times their known quotient in its place."""
    quotient = TRITON_OVER_ROUTE.get(line["row"])
    if TRITON in absent and quotient and ROUTE in line["figures"]:
        line["figures"][TRITON] = {RATE: line["figures"][ROUTE][RATE] * quotient, "stand_in": True}


def judged(line: dict[str, Any], absent: dict[str, str]) -> dict[str, Any]:
    """The line with the goals that its row has, and what was reached; None where there is no figure."""
    add_stand_in(line, absent)
    ours = line["figures"].get(OURS, {})
    line["goals"] = []
    for against, figure, limit in BY_NAME[line["row"]].goals:
        mine, its = ours.get(figure), line["figures"].get(against, {}).get(figure)
        ratio = mine / its if mine and its else None
        reached = None
        if ratio is not None:
            reached = ratio >= limit if figure == RATE else ratio <= limit
        line["goals"].append(
            {"against": against, "figure": figure, "limit": limit, "ratio": ratio, "reached": reached}
        )
    return line


def _goal(goal: dict[str, Any]) -> str:
    answer = {True: "yes", False: "NO", None: "not measured"}[goal["reached"]]
    sign = "≥" if goal["figure"] == RATE else "≤"
    ratio = "" if goal["ratio"] is None or goal["figure"] == RATE else f" ({goal['ratio']:.2f})"
    return f"{goal['figure']} {sign} {goal['limit']:g} ×: {answer}{ratio}"


def cells(line: dict[str, Any], absent: dict[str, str]) -> list[list[str]]:
    """Our line and that of each peer; of a peer that failed, why."""
    figures, made = line["figures"], []
    row = BY_NAME[line["row"]]
    for name in (OURS, *row.peers):
        got = figures.get(name)
        goals = "; ".join(_goal(goal) for goal in line["goals"] if goal["against"] == name)
        first = row.name if name == OURS else ""
        if got is None:
            why = "FAILS" if name in line["failing"] else "absent" if name in absent else "left out"
            made.append([first, name, why, "", "", "", goals])
            continue
        ratio = figures[OURS][RATE] / got[RATE] if OURS in figures and name != OURS else None
        made.append(
            [
                first,
                f"{name}*" if got.get("stand_in") else name,
                f"{got[RATE]:.0f}",
                f"{got[P50]:.3f}" if P50 in got else "",
                f"{got[P99]:.3f}" if P99 in got else "",
                "" if ratio is None else f"{ratio:.2f}",
                goals,
            ]
        )
    return made


def notes(results: dict[str, Any]) -> list[str]:
    """What must be said beside the figures."""
    how, versions = results["how"], results["versions"]
    lines = [
        f"{results['machine']['processor']}, {results['machine']['cpus']} CPUs; one process each, "
        f"`wrk -t1`, medians of {how['rounds']} interleaved rounds of {how['seconds']} s; ours with keys, "
        "metrics, limits and the fingerprint header",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    lines += [f"absent: {name}: {why}" for name, why in results["absent"].items()]
    if any(TRITON in line["figures"] and line["figures"][TRITON].get("stand_in") for line in results["rows"]):
        lines.append(
            f"* not measured here: the rate of {ROUTE} times the quotient of the two on another occasion"
        )
    lines += [
        f"FAILS, not counted: {name} on {line['row']}: {why}"
        for line in results["rows"]
        for name, why in line["failing"].items()
    ]
    goals = [goal["reached"] for line in results["rows"] for goal in line["goals"]]
    known = [reached for reached in goals if reached is not None]
    unknown = f"; {len(goals) - len(known)} not measured" if len(known) < len(goals) else ""
    lines.append(f"goals reached: {sum(known)} of {len(known)}{unknown}")
    return lines


def markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [HEADS, ["---"] * len(HEADS), *rows])


def report(results: dict[str, Any], folder: Path, console: Console) -> int:
    """Print the table, write JSON, Markdown and plot; gives 1 where an answer was wrong or missing."""
    lines = [judged(line, results["absent"]) for line in results["rows"]]
    rows = [row for line in lines for row in cells(line, results["absent"])]
    table = Table(*HEADS)
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=i + 1 < len(rows) and rows[i + 1][0] != "")
    console.print(table)
    said = notes(results)
    console.print("\n".join(said), highlight=False, markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench-service.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "bench-service.md").write_text("".join(f"{note}.\n" for note in said) + "\n" + markdown(rows))
    plot(lines, folder / "bench-service.png")
    console.print(
        f"written: {folder}/bench-service.json, bench-service.md, bench-service.png", highlight=False
    )
    return int(any(line["failing"] for line in lines))


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Requests a second, a panel for each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(lines), 1, figsize=(7, 0.8 + 1.4 * len(lines)), squeeze=False, layout="constrained"
    )
    for axis, line in zip(axes[:, 0], lines, strict=True):
        names = list(line["figures"])
        rates = [line["figures"][name][RATE] for name in names]
        colors = ["C0" if name == OURS else "0.7" for name in names]
        axis.bar_label(axis.barh(names, rates, color=colors), fmt="%.0f", padding=3)
        axis.set(title=line["row"])
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("requests a second")
    figure.savefig(path, dpi=120)
    plt.close(figure)
