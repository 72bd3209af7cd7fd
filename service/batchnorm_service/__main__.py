"""`python -m batchnorm_service DIR`: serve a directory of models until SIGINT or SIGTERM."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final, TypeVar

import click
import uvicorn
from pydantic import ValidationError
from uvicorn.config import LOGGING_CONFIG

import batchnorm
from batchnorm_service import __version__
from batchnorm_service.settings import ENV_PREFIX, Settings

# Longer than a load balancer keeps an idle connection (60 s is common), so that the server does not close one
# which a request is already on.
KEEP_ALIVE_SECONDS: Final = 65
# A client that stalls in its body must not keep a stopping server alive.
SHUTDOWN_SECONDS: Final = 20

_F = TypeVar("_F", bound=Callable[..., Any])


def _option(flag: str, field: str) -> Callable[[_F], _F]:
    info = Settings.model_fields[field]
    default = f"{info.default / 2**20:g}MiB" if field == "max_body" else str(info.default)
    return click.option(flag, field, help=f"{info.description}  [default: {default}]")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", metavar="DIR", required=False)
@_option("--host", "host")
@_option("--port", "port")
@_option("--workers", "workers")
@_option("--max-body", "max_body")
@_option("--nan", "nan")
@click.version_option(__version__)
def main(**options: Any) -> None:
    """Serve the frozen layers in DIR over HTTP (Open Inference Protocol v2).

    DIR holds NAME/VERSION/bn.safetensors or NAME.safetensors (version 1). What is not given is read from the
    environment: BATCHNORM_SERVICE_MODELS for DIR, BATCHNORM_SERVICE_PORT and so on. The address that is bound
    is printed to standard error.

    Example: batchnorm-service models --port 8080
    """
    try:
        settings = Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as refusal:
        first = refusal.errors()[0]
        name = str(first["loc"][0])
        raise click.UsageError(f"{'DIR' if name == 'models' else name}: {first['msg']}") from None

    # Workers are spawned, not forked: they and `create_app` read what was decided here from the environment.
    os.environ |= {ENV_PREFIX + name.upper(): str(value) for name, value in settings}
    os.environ.setdefault(
        "BATCHNORM_NUM_THREADS", str(max(1, batchnorm.get_num_threads() // settings.workers))
    )
    log_config = deepcopy(LOGGING_CONFIG)
    log_config["loggers"]["batchnorm_service"] = {"handlers": ["default"], "level": "INFO"}
    uvicorn.run(
        "batchnorm_service.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        ws="none",
        log_config=log_config,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


if __name__ == "__main__":
    main()
