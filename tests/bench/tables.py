"""The table, the JSON and the plot of a run."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.page import put_in
from bench.rows import DIRECTIONS, FLOOR
from bench.verdicts import behind, judged, judged_special


def processor() -> str:
    """What the system calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def mark(reached: bool | None) -> str:
    return {True: "yes", False: "NO", None: "no peer"}[reached]


def cells(line: dict[str, Any]) -> list[str]:
    ms, best = line["ms"], line["best_peer"]
    wanted = [
        (f"floor ≤ {g['limit']:.2f}" if g["against"] == FLOOR else f"peer ≥ {1 / g['limit']:.2f}")
        + f": {mark(g['reached'])}"
        for g in line["goals"]
    ]
    errors = line["error_ulps"]
    theirs = errors.get(best["name"]) if best else None
    return [
        line["row"],
        line["pass"],
        *(f"{ms[name]:.3f}" for name in ("ours", "floor")),
        f"{1 / line['over_ours']['floor']:.2f}",
        f"{best['name']} {best['ms']:.3f}" if best else "none",
        f"{best['over_ours']:.2f}" if best else "",
        ", ".join(wanted) or "",
        f"{errors['ours']:.2f}" if "ours" in errors else "",
        f"{theirs:.3g}" if theirs is not None else "",
    ]


HEADS = [
    "tensor",
    "pass",
    "ours",
    "floor",
    "ours / floor",
    "best peer",
    "best peer / ours",
    "goal: reached",
    "error, ulp",
    "peer's",
]
DEFAULT_THREADS = 2
SPECIAL_HEADS = ["group", "tensor", "pass", "milliseconds, if no other unit", "ratio", "goal", "reached"]


def special_cells(line: dict[str, Any]) -> list[str]:
    scale, unit = line["unit"]
    times = ", ".join(f"{name} {ms * scale:.3g}" for name, ms in line["ms"].items()) + unit
    return [
        line["group"],
        line["row"],
        line["pass"],
        times,
        "" if line["ratio"] is None else f"{line['ratio']:.2f}",
        f"{'≥' if line['at_least'] else '≤'} {line['limit']:.3g}",
        mark(line["reached"]),
    ]


def times_cells(line: dict[str, Any], names: list[str]) -> list[str]:
    return [line["row"], line["pass"], *(f"{line['ms'][n]:.3f}" if n in line["ms"] else "–" for n in names)]


def notes(results: dict[str, Any]) -> list[str]:
    """What must be said beside the figures."""
    machine, versions, runs = results["machine"], results["versions"], results["how"]["runs"]
    lines = [
        f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}, "
        f"{machine['simd']}; milliseconds, medians of {results['how']['rounds']} interleaved rounds"
        + (f", of which the medians of {runs} whole runs, also of quotients" if runs > 1 else ""),
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if results["absent"]:
        absent = ", ".join(f"{name} ({why})" for name, why in results["absent"].items())
        lines.append(
            f"absent: {absent}. An absent peer was not measured and is not beaten: "
            "where its time over that of a streaming copy is known from another machine, that quotient times "
            "the streaming copy's time here stands for it, marked *"
        )
    wrong = [
        f"{name} on {line['row']} {line['pass']} (off by {difference:.2g})"
        for line in results["rows"]
        for name, difference in line["wrong_answers"].items()
    ]
    if wrong:
        lines.append("not timed, since the answer differs from ours: " + "; ".join(wrong))
    reached = [g["reached"] for line in results["rows"] for g in line["goals"]]
    reached += [line["reached"] for line in results["special"]]
    known = [r for r in reached if r is not None]
    lines += filter(None, [behind(results["rows"])])
    lines.append(
        f"goals reached: {sum(known)} of {len(known)}"
        + (
            f"; {len(reached) - len(known)} without a peer to compare with"
            if len(known) < len(reached)
            else ""
        )
    )
    return lines


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def page_mark(threads: int) -> str:
    """The line of a page after which the tables of a run on so many threads stand."""
    option = "" if threads == DEFAULT_THREADS else f" THREADS={threads}"
    return f"<!-- printed by `make bench{option}` -->\n"


def report(results: dict[str, Any], folder: Path, page: Path | None, console: Console) -> int:
    """Prints the table, writes JSON, Markdown, plot and page; gives 1 where a peer's answer was not ours."""
    lines = [judged(line, results["absent"]) for line in results["rows"]]
    results["special"] = [judged_special(record) for record in results["special"]]
    names = [
        "ours",
        "floor",
        *(name for name in results["versions"] if any(name in line["ms"] for line in lines)),
    ]
    sections = [
        (HEADS, [cells(line) for line in lines]),
        (["tensor", "pass", *names], [times_cells(line, names) for line in lines]),
        (SPECIAL_HEADS, [special_cells(line) for line in results["special"]]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    said = notes(results)
    text = "\n".join(f"{note}.\n" for note in said)
    for heads, rows in sections:
        if rows:
            table = Table(*heads)
            for row in rows:
                table.add_row(*row)
            console.print(table)
            text += "\n" + markdown(heads, rows)
    console.print("\n".join(said), highlight=False, markup=False)
    (folder / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "bench.md").write_text(text)
    if lines:
        plot(lines, folder / "bench.png")
    if page:
        put_in(page, page_mark(results["machine"]["threads"]), text)
    written = f"{folder}/bench.json, bench.md" + ", bench.png" * bool(lines) + (f"; {page}" if page else "")
    console.print(f"written: {written}", highlight=False)
    return int(any(line["wrong_answers"] for line in lines))


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Time over the floor, a panel for each pass, a mark for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for line in lines for name in line["ms"] if name != "floor"))
    passes = [p for p in DIRECTIONS if any(line["pass"] == p for line in lines)]
    rows = list(dict.fromkeys(line["row"] for line in lines))
    figure, axes = plt.subplots(
        1,
        len(passes),
        figsize=(4 + 4 * len(passes), 2 + 0.28 * len(rows)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, direction in zip(axes[0], passes, strict=True):
        for i, name in enumerate(names):
            seen = [line for line in lines if line["pass"] == direction and name in line["ms"]]
            axis.scatter(
                [line["ms"][name] / line["ms"]["floor"] for line in seen],
                [rows.index(line["row"]) for line in seen],
                label=name,
                marker="D" if name == "ours" else "o",
                s=36 if name == "ours" else 16,
                zorder=3 if name == "ours" else 2,
                color=f"C{i}",
            )
        axis.set(xscale="log", title=direction, xlabel="time / floor")
        axis.axvline(1, color="0.6", linewidth=0.8)
        axis.grid(axis="y", linewidth=0.3)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)
    plt.close(figure)
