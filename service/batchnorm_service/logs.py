"""Logs on standard error: one JSON object in each line, with the id of the request if there is one."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final

# Set for the duration of a request; every record within it carries it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

MAX_ID: Final = 128
_UNSAFE = re.compile(r"[^A-Za-z0-9._:/+=@-]")


def safe_id(given: str) -> str:
    """Return a client's request id made safe for logs and headers: cut, with `_` for unsafe characters."""
    return _UNSAFE.sub("_", given[:MAX_ID])


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON; `extra={"fields": {...}}` adds members."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": os.getpid(),
            "message": record.getMessage().rstrip(),
        }
        if identity := request_id.get():
            line["request_id"] = identity
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure() -> None:
    """Send the logs of the service and of its server to standard error."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonFormatter}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "loggers": {
                name: {"handlers": ["stderr"], "level": "INFO", "propagate": False}
                # uvicorn asks the level of this very logger, not the one that it inherits.
                for name in ("uvicorn.error", "batchnorm_service")
            },
        }
    )
