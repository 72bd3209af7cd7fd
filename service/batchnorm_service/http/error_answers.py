"""Answers to errors: the table of HTTP statuses, and the body `{"error": text}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from starlette.responses import Response

from batchnorm_service.errors import (
    BodyTooLargeError,
    FingerprintMismatchError,
    ForbiddenError,
    InvalidInputError,
    LaggingError,
    LoadError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    ServiceError,
    UnauthorizedError,
    UnsupportedEncodingError,
    UnsupportedError,
)

STATUS: Final[dict[type[ServiceError], int]] = {
    InvalidInputError: 400,
    LoadError: 400,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    ModelNotFoundError: 404,
    FingerprintMismatchError: 409,
    BodyTooLargeError: 413,
    UnsupportedError: 501,
    UnsupportedEncodingError: 501,
    NotReadyError: 503,
    OverloadedError: 503,
    LaggingError: 503,
}

DEFECT: Final = "internal error; the log of the service has the traceback"


def answer(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer with this status and error text."""
    # The standard library escapes what is not ASCII, so that no text from outside can fail to be encoded.
    return Response(json.dumps({"error": text}), status, headers, media_type="application/json")


def answer_to(error: ServiceError) -> Response:
    """Return the answer to an error of the service."""
    return answer(STATUS[type(error)], str(error), error.headers)
