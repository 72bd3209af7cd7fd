"""The tables, the JSON and the plot of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.page import put_in
from bench.tables import SPECIAL_HEADS, markdown, special_cells
from bench.verdicts import judged_special
from bench_whitening.rows import BATCH_NORM, CONTENDERS, METHODS, PASSES, POSITIONS

MARK = "<!-- printed by `make bench-whitening` -->\n"
FIGURE = Path("figures", "whitening.png")  # beside the page
Line = dict[str, Any]


def figure(value: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def times(line: Line) -> list[str]:
    """Milliseconds, and how many times those of batch norm."""
    ms = line["ms"]
    over = [f"{figure(ms[name])} ({figure(ms[name] / ms[BATCH_NORM])} ×)" for name in METHODS]
    return [str(line["size"]), line["pass"], figure(ms[BATCH_NORM]), *over, str(line["steps"])]


def memory(line: Line) -> list[str]:
    """MiB that are taken beside x, dy and the output."""
    added = line["added_mib"]
    mib = [f"{added[name]:.1f}" if name in added else "–" for name in CONTENDERS]
    return [str(line["size"]), line["pass"], *mib]


TIME_HEADS = ["D", "time of", f"{BATCH_NORM}, ms", *METHODS, "steps of iterative"]
MEMORY_HEADS = ["D", "peak memory until after", f"{BATCH_NORM}, MiB", *METHODS]


def notes(results: dict[str, Any]) -> list[str]:
    """What must be said beside the figures."""
    machine, versions = results["machine"], results["versions"]
    rounds = [count for line in results["costs"] for count in line["rounds"].values()]
    reached = [line["reached"] for line in results["peers"]]
    return [
        f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}, "
        f"{machine['simd']}; {POSITIONS} positions, float32; medians of up to {max(rounds)} interleaved "
        f"rounds, of fewer where a pass takes long, {min(rounds)} at least",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "not slower than NumPy and scikit-learn, with the same steps in float64 on as many threads: "
        f"reached in {sum(reached)} of {len(reached)}",
    ]


def report(results: dict[str, Any], folder: Path, page: Path | None, console: Console) -> None:
    """Print the tables; write JSON, Markdown and plot, and the page with its figure if there is one."""
    results["peers"] = [judged_special(record) for record in results["peers"]]
    sections = [
        (TIME_HEADS, [times(line) for line in results["costs"]]),
        (MEMORY_HEADS, [memory(line) for line in results["costs"]]),
        (SPECIAL_HEADS, [special_cells(record) for record in results["peers"]]),
    ]
    said = notes(results)
    text = "\n".join(f"{note}.\n" for note in said)
    for heads, rows in sections:
        table = Table(*heads)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        text += "\n" + markdown(heads, rows)
    console.print("\n".join(said), highlight=False, markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench-whitening.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "bench-whitening.md").write_text(text)
    plot(results["costs"], folder / "bench-whitening.png")
    written = f"{folder}/bench-whitening.json, bench-whitening.md, bench-whitening.png"
    if page:
        put_in(page, MARK, text)
        plot(results["costs"], page.parent / FIGURE)
        written += f"; {page}, {page.parent / FIGURE}"
    console.print(f"written: {written}", highlight=False)


def plot(lines: list[Line], path: Path) -> None:
    """Time of each pass and memory by D, both axes logarithmic, a curve for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(direction, direction, "ms", "time, ms") for direction in PASSES]
    panels.append((PASSES[-1], "forward and backward", "added_mib", "memory beside x, dy and output, MiB"))
    drawn, axes = plt.subplots(1, len(panels), figsize=(12, 4.2), layout="constrained")
    for axis, (direction, title, what, label) in zip(axes, panels, strict=True):
        for i, name in enumerate(CONTENDERS):
            seen = [line for line in lines if line["pass"] == direction and line[what].get(name, 0) > 0]
            axis.plot(
                [line["size"] for line in seen],
                [line[what][name] for line in seen],
                marker="o",
                markersize=4,
                color="black" if name == BATCH_NORM else f"C{i}",
                label=name,
            )
        axis.set(xscale="log", yscale="log", title=title, xlabel="channels D", ylabel=label)
        sizes = sorted({line["size"] for line in lines})
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.grid(linewidth=0.3)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CONTENDERS))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=100)
    plt.close(drawn)
