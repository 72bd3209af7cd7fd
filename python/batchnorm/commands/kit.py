"""What the commands share: kinds of arguments, errors in one line, progress."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

SOURCE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
PIPE_WIDTH = 160
"""Columns of a table that does not go to a terminal: enough for a row of float64 parameters."""

HEADER = click.option(
    "--header",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    show_default=True,
    help="Whether the first line of a .csv names the columns; auto: if it holds no number.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _regular(ctx: click.Context, param: click.Parameter, path: Path) -> Path:
    # A layer is read more than once, so it cannot come from a pipe.
    if not path.is_file():
        raise click.BadParameter(f"{str(path)!r} is not a regular file.")
    return path


def layer_argument(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: an argument that is a regular file."""
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.argument(name, type=kind, callback=_regular)


def _writable(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    # Checked before the work is done.
    if path is None:
        return None
    if path.exists() and not path.is_file():
        raise click.BadParameter(f"{str(path)!r} is not a regular file, and only those are replaced.")
    if not os.access(path.parent, os.W_OK):
        raise click.BadParameter(f"there is no folder {str(path.parent)!r} that can be written to.")
    return path


def check_suffix(path: Path, suffix: str) -> None:
    """Raise ValueError unless the name of a file ends in `suffix`."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: wanted a name that ends in {suffix}")


def output_option(
    text: str, *, required: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: the option for the file to write, checked before any work is done."""
    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option("-o", "--output", type=kind, required=required, callback=_writable, help=text)


class _CommandError(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"batchnorm: {' '.join(self.format_message().split())}", file=file, err=True)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn errors of the library and the parser into one line on standard error and exit status 2."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        raise _CommandError(error.format_message() + hint) from error
    except (ValueError, TypeError, ImportError) as error:
        raise _CommandError(by_options(str(error))) from error
    except MemoryError as error:
        raise _CommandError(": ".join(filter(None, ("not enough memory", str(error))))) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has closed it: click ends without a message
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise _CommandError(f"{where}{error.strerror or error}") from error


def by_options(message: str) -> str:
    """Replace the names of arguments in an error message by the options of the running command."""
    context = click.get_current_context(silent=True)
    for option in context.command.params if context else ():
        if isinstance(option, click.Option):
            flag = max(option.opts, key=len)
            message = re.sub(rf"^{option.name}(?=: | is )", flag, message)
            if option.is_flag:
                message = message.replace(f"{option.name}=True", flag)
            message = re.sub(rf"\b{option.name}='?([\w.]+)'?", rf"{flag} \1", message)
    return message


class Command(click.Command):
    """A command whose errors are one line on standard error, and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with one_line():
            return super().invoke(ctx)


class Commands(click.Group):
    """A group of such commands, for errors in their arguments."""

    command_class = Command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the options of the group."""
        with one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command of the group."""
        with one_line():  # errors in the arguments of a command
            return super().invoke(ctx)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn an ImportError in the block into an error that says how to install the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = "bfloat16" if error.name == "ml_dtypes" else name
        raise ImportError(f"needs {error.name}, which is missing: pip install 'batchnorm[{name}]'") from error


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[float | None], None]]:
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


def read_array(path: Path) -> NDArray[Any]:
    """Read the array of a .npy file."""
    check_suffix(path, ".npy")
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: no array can be read: {error}") from error
    return array


def warn(message: str) -> None:
    """Print a warning to standard error, unless it is empty."""
    if message:
        click.echo(f"batchnorm: warning: {message}", err=True)


def print_json(**values: Any) -> None:
    """Print the values as one JSON object."""
    click.echo(json.dumps(values))
