"""The command line `batchnorm`; `main` is its entry point."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from batchnorm import _core
from batchnorm._atomic import replacing
from batchnorm._kinds import AnyFrozen, load
from batchnorm._sources import Rounding, check_fit_together, statistics
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

_SOURCE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
_PIPE_WIDTH = 160  # columns of a terminal, enough for a row of float64 parameters
_HEADER = click.option(
    "--header",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    show_default=True,
    help="Whether the first line of a .csv names the columns; auto: if it holds no number.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _regular(ctx: click.Context, param: click.Parameter, path: Path) -> Path:
    # A layer is read more than once, so it cannot come from a pipe.
    if not path.is_file():
        raise click.BadParameter(f"{str(path)!r} is not a regular file.")
    return path


def _layer_argument(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.argument(name, type=kind, callback=_regular)


def _writable(ctx: click.Context, param: click.Parameter, path: Path) -> Path:
    # Checked before the work is done.
    if path.exists() and not path.is_file():
        raise click.BadParameter(f"{str(path)!r} is not a regular file, and only those are replaced.")
    if not os.access(path.parent, os.W_OK):
        raise click.BadParameter(f"there is no folder {str(path.parent)!r} that can be written to.")
    return path


def _check_suffix(path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: wanted a name that ends in {suffix}")


def _output(text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option("-o", "--output", type=kind, required=True, callback=_writable, help=text)


class _CommandError(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"batchnorm: {' '.join(self.format_message().split())}", file=file, err=True)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turn errors of the library and the parser into one line on standard error and exit status 2."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        raise _CommandError(error.format_message() + hint) from error
    except (ValueError, TypeError, ImportError) as error:
        raise _CommandError(_by_options(str(error))) from error
    except MemoryError as error:
        raise _CommandError(": ".join(filter(None, ("not enough memory", str(error))))) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has closed it: click ends without a message
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise _CommandError(f"{where}{error.strerror or error}") from error


def _by_options(message: str) -> str:
    """Replace the names of arguments in an error message by the options of the running command."""
    context = click.get_current_context(silent=True)
    for option in context.command.params if context else ():
        if isinstance(option, click.Option):
            flag = max(option.opts, key=len)
            message = re.sub(rf"^{option.name}(?=: | is )", flag, message)
            message = re.sub(rf"\b{option.name}='?([\w.]+)'?", rf"{flag} \1", message)
    return message


class _Command(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        with _one_line():
            return super().invoke(ctx)


class _Commands(click.Group):
    command_class = _Command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line():  # errors in the arguments of a command
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_core.__version__, message="%(version)s")
def main() -> None:
    """Freeze batch normalization and whitening layers, apply, export and serve them."""


@main.command(epilog="Example: batchnorm fit my.csv -o bn.safetensors")
@click.argument("src", type=_SOURCE)
@_output("The .safetensors file to write.")
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
@_HEADER
@_JSON
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
    _check_suffix(output, ".safetensors")
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
        with _progress("fit") as advance:
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
        _warn(_by_options(str(warning.message)))
    _warn(rounding.warning(layer))
    layer.save(output)
    count = int(moments.count[0])
    if as_json:
        _print_json(path=str(output), fingerprint=layer.fingerprint, count=count, channels=layer.channels)
    else:
        channels = counted(layer.channels, "channel")
        values = counted(count, "value")
        click.echo(f"{output}: {channels} of {values}, fingerprint {layer.fingerprint}")


@main.command(epilog="Example: batchnorm apply bn.safetensors my.csv -o normalized.csv")
@_layer_argument("model")
@click.argument("src", type=_SOURCE)
@_output("The file to write, of the format of SRC.")
@_HEADER
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
        with replacing(output) as file, _progress("apply") as advance:
            rounding = Rounding(layer.dtype, source, layer.channel_axis)
            write = npy_writer(file, source) if isinstance(source, NpySource) else csv_writer(file, source)
            for done, chunk in source.chunks():
                rounding.add(chunk)
                x = chunk.astype(layer.dtype, copy=False) if isinstance(source, CsvSource) else chunk
                write(layer(x))
                advance(done)
        _warn(rounding.warning(layer))


@main.command(epilog="Example: batchnorm inspect bn.safetensors")
@_layer_argument("file")
@_JSON
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
        _print_json(path=str(file), **header, **{name: values.tolist() for name, values in columns.items()})
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
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


@main.command("import", epilog="Example: batchnorm import network.safetensors -o layers")
@_layer_argument("state")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the layers; made if there is none.",
)
@click.option(
    "--eps", type=float, default=1e-5, show_default=True, help="ε of the layers; no state holds it."
)
@_JSON
def import_(state: Path, output: Path, eps: float, as_json: bool) -> None:
    """Write a frozen layer for each batch norm in STATE, the state of a network of PyTorch.

    STATE is a .safetensors, or a .pt or .pth that torch.save wrote; these need PyTorch, and are loaded with
    weights_only=True. Each layer becomes a file NAME.safetensors in the folder, ready for `batchnorm serve`.
    """
    from batchnorm._state import frozen_layers

    with _extra("torch"):
        layers = frozen_layers(state, eps)
    output.mkdir(parents=True, exist_ok=True)
    for name, layer in layers.items():
        layer.save(output / f"{name}.safetensors")
    if as_json:
        written = {name: layer.fingerprint for name, layer in layers.items()}
        _print_json(path=str(output), eps=eps, fingerprints=written)
        return
    for name, layer in layers.items():
        channels = counted(layer.channels, "channel")
        click.echo(f"{output / name}.safetensors: {channels}, fingerprint {layer.fingerprint}")


@main.command(epilog="Example: batchnorm export bn.safetensors -o bn.onnx --rank 2")
@_layer_argument("file")
@_output("The .onnx file to write.")
@click.option(
    "--mode",
    type=click.Choice(["inference", "exact"]),
    default="inference",
    show_default=True,
    help="Of a batch norm: one BatchNormalization node, or arithmetic that gives the bits of apply.",
)
@click.option("--opset", type=int, default=15, show_default=True, help="ONNX operator set.")
@click.option("--rank", type=int, default=4, show_default=True, help="Axes of x; 2 for the rows of a .csv.")
@_JSON
def export(
    file: Path, output: Path, mode: Literal["inference", "exact"], opset: int, rank: int, as_json: bool
) -> None:
    """Write the frozen layer in FILE as an ONNX model."""
    _check_suffix(output, ".onnx")
    layer = load(file)
    if isinstance(layer, FrozenBatchNorm):
        model = layer.to_onnx(opset=opset, mode=mode, rank=rank)
    elif mode != "inference":
        raise ValueError(f"mode: was {mode}, wanted inference for the whitening layer in {file}")
    else:
        model = layer.to_onnx(opset=opset, rank=rank)
    with replacing(output) as target:
        target.write(model.SerializeToString())
    if as_json:
        _print_json(path=str(output), fingerprint=layer.fingerprint, mode=mode, opset=opset, rank=rank)
    else:
        click.echo(f"{output}: mode {mode}, opset {opset}, rank {rank}, fingerprint {layer.fingerprint}")


@main.command(
    epilog="Example: batchnorm serve . --port 8080",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve frozen layers over HTTP (Open Inference Protocol v2)."""
    with _extra("serve"):
        from batchnorm_service.__main__ import main as run
    # The service knows its own options, and their help.
    run.main(list(arguments), prog_name="batchnorm serve", standalone_mode=False)


@main.command(
    epilog="Example: batchnorm demo --output demo-output",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Train, freeze, export and serve a small network; or show what the paper does."""
    from batchnorm.demo_commands import demo as run

    with _extra("demo"):  # the demonstrations know their own options, and their help
        run.main(list(arguments), prog_name="batchnorm demo", standalone_mode=False)


def _cell(value: Any) -> str:
    """Return the text of a parameter in a table: a number, or a row of a matrix, cut if it is long."""
    if value.ndim == 0:
        return str(value)
    numbers = [*map(str, value)]
    return " ".join(numbers if len(numbers) <= 8 else [*numbers[:4], "…", *numbers[-3:]])


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn an ImportError in the block into an error that says how to install the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = "bfloat16" if error.name == "ml_dtypes" else name
        raise ImportError(f"needs {error.name}, which is missing: pip install 'batchnorm[{name}]'") from error


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[float | None], None]]:
    """Show a progress bar if standard error is a terminal; yield a function that sets the fraction done."""
    if not sys.stderr.isatty():
        yield lambda fraction: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def advance(fraction: float | None) -> None:
            if fraction is not None:
                bar.update(task, total=1.0, completed=fraction)

        yield advance


def _warn(message: str) -> None:
    if message:
        click.echo(f"batchnorm: warning: {message}", err=True)


def _print_json(**values: Any) -> None:
    click.echo(json.dumps(values))
