"""The command that checks the batch normalizations of an ONNX model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchnorm.commands.kit import (
    JSON,
    PIPE_WIDTH,
    Command,
    check_suffix,
    extra,
    layer_argument,
    output_option,
    print_json,
)
from batchnorm.streaming import counted

if TYPE_CHECKING:
    from batchnorm.onnx import Finding

_SEVERITIES = ("info", "warning", "error")
_STYLES = {"info": "dim", "warning": "yellow", "error": "bold red"}


@click.command(cls=Command, epilog="Example: batchnorm lint model.onnx --fail-on error")
@layer_argument("model")
@click.option(
    "--fix", is_flag=True, help="Turn nodes in training mode to inference mode, and check the result."
)
@output_option("The .onnx file to write the repaired model to; with --fix.", required=False)
@click.option(
    "--fail-on",
    type=click.Choice(_SEVERITIES),
    default="warning",
    show_default=True,
    help="The least severity of a finding that makes the exit status 1.",
)
@click.option("--ignore", multiple=True, metavar="NAME", help="Leave out findings of this name; repeatable.")
@JSON
def lint(
    model: Path, fix: bool, output: Path | None, fail_on: str, ignore: tuple[str, ...], as_json: bool
) -> None:
    """Check the batch normalizations in the ONNX model MODEL.

    The exit status is 0 if nothing was found that is as severe as --fail-on says, 1 if something was, and 2
    after an error.
    """
    if fix != (output is not None):
        raise click.UsageError("--fix and -o are used together: -o names the file for the repaired model")
    with extra("onnx"):
        from batchnorm.onnx import findings, inference_mode
        from batchnorm.onnx import lint as check
    if unknown := [name for name in ignore if name not in findings.RULES]:
        raise click.UsageError(
            f"--ignore: there is no finding {unknown[0]!r}, only {', '.join(findings.RULES)}"
        )
    fixed: list[Finding] = []
    if output is None:
        found = check(model)
    else:
        check_suffix(output, ".onnx")
        _, fixed = inference_mode.fix(model, out=output)
        found = check(output)
    found = [finding for finding in found if finding.name not in ignore]
    if as_json:
        print_json(
            path=str(model),
            output=None if output is None else str(output),
            counts={severity: sum(f.severity == severity for f in found) for severity in _SEVERITIES},
            findings=[{**finding._asdict(), "remedy": finding.remedy} for finding in found],
            fixed=[finding._asdict() for finding in fixed],
        )
    else:
        _print(model, output, found, fixed)
    least = _SEVERITIES.index(fail_on)
    if any(_SEVERITIES.index(finding.severity) >= least for finding in found):
        click.get_current_context().exit(1)


def _print(model: Path, output: Path | None, found: Sequence[Finding], fixed: Sequence[Finding]) -> None:
    """Print the findings as a table, the remedies, and a line with their number."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for finding in fixed:
        click.echo(f"{output}: {finding.node} {finding.message}: fixed")
    if found:
        table = Table("severity", "finding", "node", "what was found")
        for column in table.columns:
            column.overflow = "fold"
        for finding in found:
            severity = Text(finding.severity, _STYLES[finding.severity])
            table.add_row(severity, finding.name, Text(finding.node), Text(finding.message))
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
        for name, remedy in {finding.name: finding.remedy for finding in found}.items():
            click.echo(f"{name}: {remedy}")
    errors, warnings, infos = (sum(f.severity == s for f in found) for s in reversed(_SEVERITIES))
    click.echo(f"{output or model}: {counted(errors, 'error')}, {counted(warnings, 'warning')}, {infos} info")
