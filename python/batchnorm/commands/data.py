"""The commands that fit a frozen layer to data, apply it to data, and show it."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from batchnorm import _core
from batchnorm._atomic import replacing
from batchnorm._kinds import AnyFrozen, load
from batchnorm._sources import Rounding, check_fit_together, statistics
from batchnorm.commands.kit import (
    HEADER,
    JSON,
    PIPE_WIDTH,
    SOURCE,
    Command,
    by_options,
    check_suffix,
    layer_argument,
    output_option,
    print_json,
    progress,
    warn,
)
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.frozen_whitening import FrozenWhitening
from batchnorm.streaming import (
    CsvSource,
    Header,
    NpySource,
    counted,
    csv_writer,
    merge_in_order,
    npy_writer,
    open_source,
)


@click.command(cls=Command, epilog="Example: batchnorm fit my.csv -o bn.safetensors")
@click.argument("src", type=SOURCE)
@output_option("The .safetensors file to write.")
@click.option("--eps", type=float, default=1e-5, show_default=True, help="Added to the variances.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    help="Type of the parameters.  [default: float64 for a float64 .npy, else float32]",
)
@click.option("--channel-axis", type=int, default=1, show_default=True, help="Axis of the channels.")
@click.option(
    "--ddof", type=click.Choice([0, 1]), default=1, show_default=True, help="1: unbiased variance; 0: biased."
)
@click.option(
    "--whiten",
    type=click.Choice(["zca", "pca", "cholesky", "iterative"]),
    help="Whiten by this method, in place of batch normalization.",
)
@click.option(
    "--groups",
    type=click.IntRange(min=1),
    help="With --whiten: number of groups of adjacent channels to whiten each by itself.  [default: 1]",
)
@HEADER
@JSON
def fit(
    src: Path,
    output: Path,
    eps: float,
    dtype: str | None,
    channel_axis: int,
    ddof: int,
    whiten: Literal["zca", "pca", "cholesky", "iterative"] | None,
    groups: int | None,
    header: Header,
    as_json: bool,
) -> None:
    """Write the frozen layer that normalizes or whitens the data in SRC.

    SRC is a .npy array of floats, or a .csv file in which a line is a sample and a column a channel. It may
    also be a pipe, or - for standard input. It is read once, chunk by chunk, and need not fit into memory.
    """
    check_suffix(output, ".safetensors")
    if groups is not None and whiten is None:
        raise ValueError(f"--groups: was {groups}, but only --whiten has groups")
    with open_source(src, channel_axis, np.dtype(np.float64), header) as source:
        if isinstance(source, CsvSource) and channel_axis not in (1, -1):
            raise ValueError(f"--channel-axis: was {channel_axis}, but the channels of a .csv are on axis 1")
        if source.channels % (groups or 1):
            wanted = f"a divisor of the {counted(source.channels, 'channel')} of {source.name}"
            raise ValueError(f"--groups: was {groups}, wanted {wanted}")
        if dtype is None:
            dtype = "float64" if isinstance(source, NpySource) and source.dtype.itemsize == 8 else "float32"
        rounding = Rounding(np.dtype(dtype), source, channel_axis)
        total: _core.Moments | _core.CoMoments | None
        with progress("fit") as advance:
            if whiten is None:
                measure = partial(_core.moments, channel_axis=channel_axis)
                total = merge_in_order(statistics(source, measure, rounding, advance))
            else:
                together = partial(_core.comoments, groups=groups or 1, channel_axis=channel_axis)
                total = merge_in_order(statistics(source, together, rounding, advance))
    moments = total.moments if isinstance(total, _core.CoMoments) else total
    if moments is None or moments.count.min(initial=np.inf) < 2:
        raise ValueError(f"{source.name}: fewer than 2 values in a channel")
    options: dict[str, Any] = {"eps": eps, "ddof": ddof, "channel_axis": channel_axis, "dtype": dtype}
    layer: AnyFrozen
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(total, _core.CoMoments):
            layer = FrozenWhitening.from_comoments(total, **options | {"method": whiten})
        else:
            layer = FrozenBatchNorm.from_moments(moments, **options)
    for warning in caught:
        warn(by_options(str(warning.message)))
    warn(rounding.warning(layer))
    layer.save(output)
    count = int(moments.count[0])
    if as_json:
        print_json(path=str(output), fingerprint=layer.fingerprint, count=count, channels=layer.channels)
    else:
        channels = counted(layer.channels, "channel")
        values = counted(count, "value")
        click.echo(f"{output}: {channels} of {values}, fingerprint {layer.fingerprint}")


@click.command(cls=Command, epilog="Example: batchnorm apply bn.safetensors my.csv -o normalized.csv")
@layer_argument("model")
@click.argument("src", type=SOURCE)
@output_option("The file to write, of the format of SRC.")
@HEADER
def apply(model: Path, src: Path, output: Path, header: Header) -> None:
    """Normalize or whiten the data in SRC by the frozen layer in MODEL.

    SRC is anything that fit reads, and the output has its format, .npy or .csv. The output file appears only
    when it is complete. NaN and Inf are errors in a .csv, and stay NaN and Inf in a .npy.
    """
    layer = load(model)
    with open_source(src, layer.channel_axis, layer.dtype, header) as source:
        if output.suffix.lower() != source.suffix:
            raise ValueError(f"{output}: wanted a name that ends in {source.suffix}, the format of SRC")
        check_fit_together(layer, str(model), source)
        with replacing(output) as file, progress("apply") as advance:
            rounding = Rounding(layer.dtype, source, layer.channel_axis)
            write = npy_writer(file, source) if isinstance(source, NpySource) else csv_writer(file, source)
            for done, chunk in source.chunks():
                rounding.add(chunk)
                x = chunk.astype(layer.dtype, copy=False) if isinstance(source, CsvSource) else chunk
                write(layer(x))
                advance(done)
        warn(rounding.warning(layer))


@click.command(cls=Command, epilog="Example: batchnorm inspect bn.safetensors")
@layer_argument("file")
@JSON
def inspect(file: Path, as_json: bool) -> None:
    """Show the frozen layer in FILE."""
    layer = load(file)
    header: dict[str, Any] = {
        "fingerprint": layer.fingerprint,
        "channels": layer.channels,
        "channel_axis": layer.channel_axis,
        "dtype": layer.dtype.name,
    }
    names: tuple[str, ...] = ("mean", "bias", "matrix")
    if isinstance(layer, FrozenBatchNorm):
        header["eps"], names = layer.eps, ("gamma", "beta", "mean", "var")
    else:
        header["groups"] = layer.groups
    columns = {name: getattr(layer, name) for name in names}
    if as_json:
        print_json(path=str(file), **header, **{name: values.tolist() for name, values in columns.items()})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("channel", *columns)
    for column in table.columns:
        column.justify, column.overflow = "right", "fold"
    for k, row in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(str(k), *map(_cell, row))
    click.echo(str(file))
    for name, value in header.items():
        click.echo(f"  {name:<13}{np.float32(value) if name == 'eps' else value!s}")
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def _cell(value: Any) -> str:
    """Return the text of a parameter in a table: a number, or a row of a matrix, cut if it is long."""
    if value.ndim == 0:
        return str(value)
    numbers = [*map(str, value)]
    return " ".join(numbers if len(numbers) <= 8 else [*numbers[:4], "…", *numbers[-3:]])
