"""The commands of `batchnorm demo`; each loads its demonstration, and what that needs, when it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

__all__ = ["demo"]


def _folder(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        default=default,
        show_default=True,
        help="Folder for the report and all else that is written.",
    )


def _steps(default: int, least: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    kind = click.IntRange(min=least)
    text = "Training steps of each network."
    return click.option("--steps", type=kind, default=default, show_default=True, help=text)


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """Let a check that failed end with status 1, since it is no misuse."""
    try:
        yield
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error


@click.group(
    invoke_without_command=True,
    epilog="Example: batchnorm demo --output demo-output",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@_folder("demo-output")
@click.pass_context
def demo(ctx: click.Context, output: Path) -> None:
    """Train, freeze, export and serve a small network on real data, and check every stop.

    With a command: show what the paper says of the bias, of training, and of convolutions.
    """
    if ctx.invoked_subcommand:
        if ctx.get_parameter_source("output") is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--output belongs after the command: {ctx.invoked_subcommand} --output DIR"
            )
        return
    from batchnorm.demo import main as run

    with _checked():
        run(output)


@demo.command(epilog="Example: batchnorm demo bias --output demo-output/bias")
@_folder("demo-output/bias")
def bias(output: Path) -> None:
    """Learn a bias before the subtraction of the mean (section 2 of the paper).

    The gradient that takes the mean as a constant lets the bias grow without bound, and the loss stays as it
    is; the gradient through the mean does not move it. Takes seconds.
    """
    from batchnorm.demo.bias import main as run

    run(output)


@demo.command(epilog="Example: batchnorm demo paper --output demo-output/paper")
@_folder("demo-output/paper")
@_steps(4000, 20)
def paper(output: Path, steps: int) -> None:
    """Repeat the paper's first experiment in small, on 5,000 digits of MNIST (section 4.1).

    Three hidden layers of 100 sigmoid units, with and without batch normalization, five seeds each: accuracy
    by step, and how the input of a sigmoid moves. Takes minutes.
    """
    from batchnorm.demo.paper import main as run

    run(output, steps=steps)


@demo.command(epilog="Example: batchnorm demo convolution --output demo-output/convolution")
@_folder("demo-output/convolution")
@_steps(1000, 50)
def convolution(output: Path, steps: int) -> None:
    """Train a small convolutional network on the same digits (section 3.2 of the paper).

    Each feature map is normalized over the batch and all positions. The biases of the convolutions, which
    the normalization makes redundant, are watched: their gradients are zero to rounding.
    """
    from batchnorm.demo.convolution import main as run

    run(output, steps=steps)


@demo.command(epilog="Example: batchnorm demo recalibrate --output demo-output/recalibrate")
@_folder("demo-output/recalibrate")
@_steps(1000, 10)
def recalibrate(output: Path, steps: int) -> None:
    """Give an ONNX model new statistics after its weights were rounded, or where its data have changed.

    Accuracy before and after plain and layerwise recalibration, of the network of `batchnorm demo`. Takes
    about half a minute.
    """
    from batchnorm.demo.recalibrate import main as run

    run(output, steps=steps)
