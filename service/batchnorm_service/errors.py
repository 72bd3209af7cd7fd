"""Errors of the service, without HTTP: `http.error_answers.STATUS` maps each class to its status.

The text of an error is sent to the client: it names what was wrong and what was wanted, never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """Base class of all errors that a client gets as an answer; only its subclasses are raised.

    Attributes:
        headers: Headers of the answer, in addition to the error text.
    """

    headers: ClassVar[Mapping[str, str]] = {}


class InvalidInputError(ServiceError):
    """The request is malformed, or its tensor does not fit the model."""


class ModelNotFoundError(ServiceError):
    """There is no model of that name, or it has no such version."""


class NotReadyError(ServiceError):
    """The model is known but not loaded, or no model is loaded at all."""


class BodyTooLargeError(ServiceError):
    """The request body exceeds the limit of the settings."""


class FingerprintMismatchError(ServiceError):
    """The request requires another fingerprint than that of the model."""


class UnsupportedError(ServiceError):
    """The request uses a part of the protocol that the service or its installation does not support."""


class UnsupportedEncodingError(UnsupportedError):
    """The body has a content coding that the service does not support."""

    headers: ClassVar[Mapping[str, str]] = {"Accept-Encoding": "gzip, deflate"}


class LoadError(ServiceError):
    """A model cannot be loaded; what was served before is still served."""


class UnauthorizedError(ServiceError):
    """The request has no key, or an unknown one."""

    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ServiceError):
    """The key is not of the needed scope, or the control API is off."""


class OverloadedError(ServiceError):
    """The limits of requests or bytes in flight are reached."""

    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class LaggingError(ServiceError):
    """A change of the models is made, but not every worker has applied it in time."""
