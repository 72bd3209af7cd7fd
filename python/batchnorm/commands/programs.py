"""The commands that run other programs of the project: the service and the demonstrations."""

from __future__ import annotations

import click

from batchnorm.commands.kit import Command, extra


@click.command(
    cls=Command,
    epilog="Example: batchnorm serve . --port 8080",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve frozen layers over HTTP (Open Inference Protocol v2)."""
    with extra("serve"):
        from batchnorm_service.__main__ import main as run
    # The service knows its own options, and their help.
    run.main(list(arguments), prog_name="batchnorm serve", standalone_mode=False)


@click.command(
    cls=Command,
    epilog="Example: batchnorm demo --output demo-output",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Train, freeze, export and serve a small network; or show what the paper does."""
    from batchnorm.commands.demonstrations import demo as run

    with extra("demo"):  # the demonstrations know their own options, and their help
        run.main(list(arguments), prog_name="batchnorm demo", standalone_mode=False)
