"""The command that folds the batch normalizations of an ONNX model."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from batchnorm.commands.kit import (
    JSON,
    Command,
    check_suffix,
    extra,
    layer_argument,
    output_option,
    print_json,
    read_array,
)
from batchnorm.streaming import counted

if TYPE_CHECKING:
    from batchnorm.onnx import FoldReport


@click.command(cls=Command, epilog="Example: batchnorm fold model.onnx -o folded.onnx --max-error 1e-5")
@layer_argument("model")
@output_option("The .onnx file to write.")
@click.option(
    "--input",
    "inputs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What to run both models on: a .npy for a model of one input, or a .npz of arrays by name of the "
    "input. By default random values.",
)
@click.option(
    "--max-error",
    type=float,
    help="The largest change that is allowed in an output, relative to its largest magnitude.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Whether both models are run, which needs onnxruntime.",
)
@JSON
def fold(
    model: Path, output: Path, inputs: Path | None, max_error: float | None, verify: bool, as_json: bool
) -> None:
    """Fold the batch normalizations in the ONNX model MODEL into the linear nodes beside them.

    Then the model and the folded one are run in ONNX Runtime, and it is printed how far they are apart. The
    exit status is 1 if that is more than --max-error, and then nothing is written.
    """
    check_suffix(output, ".onnx")
    with extra("onnx"):
        from batchnorm import onnx

        try:
            feeds = None if inputs is None else _feeds(inputs, [*onnx.graph.Graph(model).inputs])
            _, report = onnx.fold(model, inputs=feeds, max_error=max_error, verify=verify, out=output)
        except onnx.InexactFoldError as error:
            _print(error.report, None, as_json)
            raise click.exceptions.Exit(1) from error
    _print(report, output, as_json)


def _feeds(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    """Read the inputs of a model from a file."""
    if path.suffix.lower() != ".npz":
        values = read_array(path)
        if len(names) != 1:
            there = ", ".join(names) or "none"
            raise ValueError(f"{path}: found one array, wanted a .npz of the model's inputs: {there}")
        return {names[0]: values}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no arrays can be read: {error}") from error


def _print(report: FoldReport, output: Path | None, as_json: bool) -> None:
    if as_json:
        path = None if output is None else str(output)
        print_json(path=path, folded=report.folded, max_error=report.max_error, **dataclasses.asdict(report))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("batch normalization", overflow="fold"), "what became of it")
    for node in report.nodes:
        into = f"folded into {node.into}" + ", which comes after it" * node.before
        table.add_row(Text(node.name), Text(into if node.into else f"left: {node.reason}"))
    Console().print(table)
    for error in report.errors:
        size = f"{error.relative:.3g} of its largest magnitude, {error.ulps:.3g} ulp"
        click.echo(f"output {error.output!r}: changed by {error.absolute:.3g}, {size}")
    total = f"{report.folded} of {counted(len(report.nodes), 'batch normalization')} folded"
    click.echo(f"{output}: {total}" if output else f"--max-error is exceeded, nothing is written: {total}")
