"""Errors of the service, without HTTP: `http.error_answers.STATUS` maps each class to its status.

The text of an error is sent to the client: it names what was wrong and what was wanted, never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """Base of all errors that are answered to a client; only its subclasses are raised.

    Attributes:
        headers: Headers that the answer has beside the text.
    """

    headers: ClassVar[Mapping[str, str]] = {}


class InvalidInputError(ServiceError):
    """The request is malformed, or its tensor does not fit the model."""


class ModelNotFoundError(ServiceError):
    """There is no model of that name, or no such version of it."""


class NotReadyError(ServiceError):
    """The model is known and could not be loaded, or no model is loaded at all."""


class BodyTooLargeError(ServiceError):
    """The request body exceeds the limit of the settings."""


class FingerprintMismatchError(ServiceError):
    """The request demands another fingerprint than that of the model."""


class UnsupportedError(ServiceError):
    """The request uses a part of the protocol that the service or its installation does not support."""


class UnsupportedEncodingError(UnsupportedError):
    """The body has a content coding that the service does not support."""

    headers: ClassVar[Mapping[str, str]] = {"Accept-Encoding": "gzip, deflate"}


class LoadError(ServiceError):
    """A model cannot be loaded; what was served before still is."""


class UnauthorizedError(ServiceError):
    """The request has no key, or an unknown one."""

    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ServiceError):
    """The key is not of the needed scope, or the control API is off."""


class OverloadedError(ServiceError):
    """As many requests or bytes are in flight as the settings allow."""

    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class LaggingError(ServiceError):
    """A change of the models is made, but not every worker has taken it over in time."""
