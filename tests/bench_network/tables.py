"""The tables, the JSON and the plot of a run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.page import put_in
from bench_network.rows import (
    COMPILING,
    EAGER,
    MEMORY_PEAK,
    OPERATORS,
    PASSES,
    PYTORCH,
    REST,
    STEP,
    VARIANTS,
)
from bench_network.verdicts import UNDECIDED, YES, added, judged, ratio

MARK = "<!-- printed by `make bench-network` -->\n"
ABSENT = "–"


def milliseconds(line: dict[str, Any], variant: str) -> str:
    """The median of the rounds, if the line has the variant."""
    seconds = line["seconds"].get(variant)
    return f"{statistics.median(seconds) * 1e3:.0f}" if seconds else ABSENT


def times(lines: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    made = [["network", "pass", *(f"{name}, ms" for name in names)]]
    for line in lines:
        made.append([line["row"], line["pass"], *(milliseconds(line, name) for name in names)])
    return made


def reached(lines: list[dict[str, Any]]) -> list[list[str]]:
    made = [["network", "pass", "what", "of", "over that of", "found (middle half)", "goal", "reached"]]
    for line in lines:
        for goal in line["goals"]:
            middle = "" if goal["what"] == MEMORY_PEAK else f" ({goal['low']:.2f} to {goal['high']:.2f})"
            made.append(
                [
                    line["row"],
                    line["pass"],
                    *(goal[key] for key in ("what", "variant", "against")),
                    f"{goal['median']:.2f}{middle}",
                    f"≤ {goal['limit']:g}",
                    goal["reached"],
                ]
            )
    return made


def beside(lines: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """Of the steps: what is added to the rest, what the profiler sees in the operators, and memory."""
    made = [["network", "variant", "added to the rest, ms", *(f"{o}, ms" for o in OPERATORS), "peak, MiB"]]
    for line in lines:
        for name in names if line["pass"] == STEP else ():
            seen, peaks = line["operators"][name], line["peak_mib"]
            made.append(
                [
                    line["row"],
                    name,
                    f"{statistics.median(added(line, name)) * 1e3:.0f}",
                    *(f"{seen[operator]:.1f}" for operator in OPERATORS),
                    f"{peaks[name]:.0f}" if name in peaks else ABSENT,
                ]
            )
    return made


def variants_said(lines: list[dict[str, Any]]) -> str:
    """Which variants a run has, and in which rows it has compiled ones."""
    seen = [name for name in VARIANTS if any(name in line["seconds"] for line in lines)]
    listed = ", ".join(seen)
    if seen == [*EAGER, REST]:
        return f"variants: those that are not compiled (EAGER=1), which are {listed}"
    if seen != list(VARIANTS):
        return f"variants: only some, which are {listed}"
    compiled = list(dict.fromkeys(line["row"] for line in lines if set(COMPILING) & set(line["seconds"])))
    return f"variants: all, which are {listed}; the compiled ones in these rows: {', '.join(compiled)}"


def notes(results: dict[str, Any]) -> list[str]:
    """What must be said beside the figures."""
    machine, how = results["machine"], results["how"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['simd']}; medians of "
        f"{how['rounds']} interleaved rounds. A step is forward, loss and backward, without an optimizer; "
        "eval is a pass without gradients. Peak memory is of a whole process, PyTorch's own code included",
        "versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        variants_said(results["rows"]),
    ]
    if how["quick"]:
        lines.append("tiny sizes: these figures say nothing")
    marks = [goal["reached"] for line in results["rows"] for goal in line["goals"]]
    lines.append(
        f"goals reached: {marks.count(YES)} of {len(marks)}; undecided, since the middle half of the rounds "
        "lies on both sides, or PyTorch's network takes no longer than the rest in a quarter of them: "
        f"{marks.count(UNDECIDED)}"
    )
    return lines


def markdown(rows: list[list[str]]) -> str:
    heads, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in [heads, ["---"] * len(heads), *others])


def report(results: dict[str, Any], folder: Path, page: Path | None, console: Console) -> int:
    """Print the tables; write JSON, Markdown and plot, and the page if there is one."""
    lines = results["rows"]
    for line in lines:
        line["goals"] = judged(line)
    names = [name for name in VARIANTS if any(name in line["seconds"] for line in lines)]
    eager = [name for name in EAGER if name in names]
    sections = [times(lines, names), reached(lines), beside(lines, eager)]
    for heads, *rows in sections:
        table = Table(*heads)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    said = notes(results)
    console.print("\n".join(said), highlight=False, markup=False)
    text = "".join(f"{note}.\n\n" for note in said) + "\n".join(map(markdown, sections))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench-network.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "bench-network.md").write_text(text)
    plot(lines, names, folder / "bench-network.png")
    written = "bench-network.json, bench-network.md, bench-network.png"
    console.print(f"written: {folder}/{written}" + (f"; {page}" if page else ""), highlight=False)
    if page:
        put_in(page, MARK, text)
    return 0


def plot(lines: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Time over that of PyTorch's network, a panel for each pass, a mark for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(dict.fromkeys(line["row"] for line in lines))
    figure, axes = plt.subplots(
        1, len(PASSES), figsize=(12, 2 + 0.4 * len(rows)), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, direction in zip(axes[0], PASSES, strict=True):
        for i, name in enumerate(names):
            seen = [line for line in lines if line["pass"] == direction and name in line["seconds"]]
            found = [ratio(line["seconds"][name], line["seconds"][PYTORCH]) for line in seen]
            medians = [f["median"] for f in found]
            spread = [[f["median"] - f["low"] for f in found], [f["high"] - f["median"] for f in found]]
            places = [rows.index(line["row"]) + 0.1 * (i - len(names) / 2) for line in seen]
            axis.errorbar(medians, places, xerr=spread, fmt="o", markersize=4, label=name, color=f"C{i}")
        axis.set(title=direction, xlabel="time / PyTorch's")
        axis.axvline(1, color="0.6", linewidth=0.8)
        axis.grid(axis="y", linewidth=0.3)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)
    plt.close(figure)
