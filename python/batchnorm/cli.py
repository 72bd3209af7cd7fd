"""The command line `batchnorm`; `main` is its entry point."""

from __future__ import annotations

import click

from batchnorm import _core
from batchnorm.commands import data, fold, lint, models, programs, recalibrate
from batchnorm.commands.kit import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_core.__version__, message="%(version)s")
def main() -> None:
    """Freeze batch normalization and whitening layers, apply, export and serve them."""


for _command in (
    data.fit,
    data.apply,
    data.inspect,
    models.import_,
    models.export,
    recalibrate.recalibrate,
    fold.fold,
    lint.lint,
    programs.serve,
    programs.demo,
):
    main.add_command(_command)
