"""`python -m batchnorm_service DIR`: serves a directory of models until SIGINT or SIGTERM."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import ByteSize, ValidationError
from pydantic.fields import FieldInfo

import batchnorm
from batchnorm_service import __version__, logs
from batchnorm_service.errors import LoadError
from batchnorm_service.keys import SCOPES, Keyring, new_key
from batchnorm_service.models.repository import Repository
from batchnorm_service.models.shared_state import SharedState
from batchnorm_service.process.server import serve, tls_context
from batchnorm_service.process.supervisor import supervise
from batchnorm_service.settings import ENV_PREFIX, Settings

logger = logging.getLogger("batchnorm_service")

_F = TypeVar("_F", bound=Callable[..., Any])


def _options(command: _F) -> _F:
    """Add an option for each setting except DIR."""
    for name, field in reversed(Settings.model_fields.items()):
        if name != "models":
            flag = f"--{name.replace('_', '-')}"
            if field.annotation is bool:
                command = click.option(flag, is_flag=True, default=None, help=field.description)(command)
            else:
                command = click.option(flag, help=_help(field))(command)
    return command


def _help(field: FieldInfo) -> str:
    if field.default is None:
        return f"{field.description}"
    shown = f"{field.default / 2**20:g}MiB" if field.annotation is ByteSize else str(field.default)
    return f"{field.description}  [default: {shown}]"


def _print_new_key(context: click.Context, _: click.Parameter, scopes: str | None) -> None:
    if scopes is None or context.resilient_parsing:
        return
    try:
        key, line = new_key(scopes)
    except ValueError as reason:
        raise click.BadParameter(str(reason)) from None
    click.echo(f"key, shown this once: {key}\nline for the file:    {line}")
    context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", metavar="[DIR]", required=False)
@_options
@click.option(
    "--new-key",
    metavar="SCOPE[,SCOPE...]",
    is_eager=True,
    expose_value=False,
    callback=_print_new_key,
    help=f"Print a new key and its line for the file of --keys, and exit; scopes: {', '.join(SCOPES)}",
)
@click.version_option(__version__)
def main(**options: Any) -> None:
    """Serve the frozen layers in DIR over HTTP (Open Inference Protocol v2).

    DIR has NAME/VERSION/bn.safetensors or NAME.safetensors (version 1), or ONNX files instead of these.
    Options that are not given are read from the environment: BATCHNORM_SERVICE_MODELS for DIR,
    BATCHNORM_SERVICE_PORT and so on. The bound address is logged to standard error.

    Example: batchnorm serve . --port 8080
    """
    settings = _settings({name: value for name, value in options.items() if value is not None})
    # Workers are new processes and read the settings from the environment.
    os.environ |= {ENV_PREFIX + name.upper(): str(value) for name, value in settings if value is not None}
    os.environ.setdefault(
        "BATCHNORM_NUM_THREADS", str(max(1, batchnorm.get_num_threads() // settings.workers))
    )
    logs.configure()
    try:
        run_dir = Path(tempfile.mkdtemp(prefix="batchnorm-service-", dir=settings.run_dir))
    except OSError as reason:
        raise click.ClickException(f"no directory for shared state: {reason}") from None
    try:
        status = _run(settings, SharedState(run_dir))
    except LoadError as reason:
        raise click.ClickException(str(reason)) from None
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    sys.exit(status)


def _settings(given: dict[str, Any]) -> Settings:
    """Return the settings, checked here so that a mistake is reported once, and not by each worker."""
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{first['loc'][0]}: " if first["loc"] else ""
        reason = first["msg"].removeprefix("Value error, ")
        raise click.UsageError(name.replace("models", "DIR") + reason) from None
    for name, read in (("keys", _keys), ("tls_cert", tls_context)):
        try:
            read(settings)
        except (OSError, ValueError) as reason:
            raise click.UsageError(f"{name}: {reason}") from None
    return settings


def _keys(settings: Settings) -> Keyring | None:
    return Keyring(settings.keys) if settings.keys else None


def _run(settings: Settings, state: SharedState) -> int:
    failed = Repository(settings.directory(), state).load_all()
    if failed and settings.strict:
        click.echo(f"{len(failed)} models could not be loaded, and --strict was given", err=True)
        return 1
    listener = _listening(settings)
    if settings.workers > 1:
        return supervise(settings, state, listener)
    serve(settings, state, listener)
    return 0


def _listening(settings: Settings) -> socket.socket:
    """Return a socket that listens at the address; clients that connect before the service is up wait."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    address = settings.host, settings.port
    try:
        listener = socket.create_server(address, family=family, backlog=settings.max_connections)
    except OSError as reason:
        raise click.ClickException(f"{settings.host}:{settings.port}: {reason.strerror}") from None
    scheme, host = "https" if settings.tls_cert else "http", settings.host
    shown = f"[{host}]" if ":" in host else host
    logger.info("listening on %s://%s:%d", scheme, shown, listener.getsockname()[1])
    return listener


if __name__ == "__main__":
    main()
