"""The command that gives the batch normalizations of an ONNX model the statistics of data."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from batchnorm.commands.kit import (
    JSON,
    PIPE_WIDTH,
    Command,
    by_options,
    check_suffix,
    extra,
    layer_argument,
    output_option,
    print_json,
    progress,
    read_array,
    warn,
)
from batchnorm.streaming import counted

if TYPE_CHECKING:
    from batchnorm.onnx import Recalibration

_MEBIBYTE = 2**20
_ARRAY = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(cls=Command, epilog="Example: batchnorm recalibrate model.onnx images.npy -o new.onnx")
@layer_argument("model")
@click.argument("data", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@output_option("The .onnx file to write.")
@click.option(
    "--layerwise", is_flag=True, help="Measure layer after layer, each behind the new statistics before it."
)
@click.option(
    "--population",
    type=click.Choice(["algorithm2", "pooled"]),
    help="Variance within batches, or of all values together.  [default: pooled if MODEL fixes its batch "
    "axis below 32 or a batch has one value in a channel, else algorithm2]",
)
@click.option(
    "--blend",
    type=float,
    default=1.0,
    show_default=True,
    help="Weight w of what is measured: new = (1 − w)·old + w·measured.",
)
@click.option(
    "--batch-size", type=int, help="Examples of a batch.  [default: the number that MODEL fixes, or 32]"
)
@click.option(
    "--memory",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Most MiB of inputs of layers that are held for one batch; if there are more, the data are gone "
    "over several times.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of ONNX Runtime; rounding may depend on it.",
)
@click.option("--labels", type=_ARRAY, help="A .npy of the class of each example: prints the accuracy.")
@click.option(
    "--reference", type=_ARRAY, help="A .npy of wanted outputs: prints how far the model is from them."
)
@click.option("--skip", is_flag=True, help="Leave out layers that cannot be recalibrated.")
@JSON
def recalibrate(
    model: Path,
    data: tuple[Path, ...],
    output: Path,
    layerwise: bool,
    population: Literal["algorithm2", "pooled"] | None,
    blend: float,
    batch_size: int | None,
    memory: int,
    threads: int,
    labels: Path | None,
    reference: Path | None,
    skip: bool,
    as_json: bool,
) -> None:
    """Write a copy of MODEL whose batch normalizations have the statistics of DATA.

    DATA are files of examples along axis 0, .npy for a model of one input, .npz with arrays by input name, or
    folders of these. The peak of the memory for inputs of layers is printed; to it comes what ONNX Runtime
    needs to run the model. Needs the extra batchnorm[onnxruntime].
    """
    check_suffix(output, ".onnx")
    with extra("onnxruntime"):
        from batchnorm.onnx import recalibrate as run

        with progress("recalibrate") as advance, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, report = run(
                model,
                list(data),
                layerwise=layerwise,
                population=population,
                blend=blend,
                batch_size=batch_size,
                memory=memory * _MEBIBYTE,
                threads=threads,
                labels=None if labels is None else read_array(labels),
                reference=None if reference is None else read_array(reference),
                skip=skip,
                out=output,
                progress=advance,
            )
    for warning in caught:
        warn(by_options(str(warning.message)))
    if as_json:
        print_json(path=str(output), **report.to_dict())
    else:
        _show(output, report)


def _show(output: Path, report: Recalibration) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "layer", "channels", "values", "mean moved, σ", "at most", "ln var ratio", "at most", "constant"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in report.layers:
        cells = ["–"] * 4  # where the old statistics were impossible
        if layer.shift is not None:
            moved = layer.shift.summary()
            measures = [moved[name] for name in ("mean_shift", "log_variance_ratio")]
            cells = [f"{value:.3g}" for measure in measures for value in (measure.mean, measure.max)]
        table.add_row(
            layer.name, str(layer.channels), str(layer.values), *cells, str(len(layer.constant) or "")
        )
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False).print(table)
    form = "layerwise" if report.layerwise else "plain"
    layers, times = counted(len(report.layers), "layer"), counted(report.passes, "time")
    click.echo(
        f"{output}: {layers}, {form}, blend {report.blend:g}, batches {report.batches}, gone over {times}"
    )
    click.echo(f"  population  {report.population}: {report.reason}")
    click.echo(f"  peak memory {report.memory / _MEBIBYTE:.3g} MiB of inputs of layers for one batch")
    if report.before and report.after:
        for name, what in (("accuracy", "accuracy"), ("rms", "rms error"), ("largest", "max error")):
            before, after = getattr(report.before, name), getattr(report.after, name)
            if before is not None and after is not None:
                form = ".1%" if name == "accuracy" else ".3g"
                click.echo(f"  {what:<12}{before:{form}} before, {after:{form}} after")
